"""Starts the real servers as processes on ports that the system chooses."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

READY_SECONDS = 60.0


class ServerProcess:
    """One service's process, with an artifact store and dataset root shared by all under ``folder``.

    After ``kill`` and ``start`` it listens on the ports that it had before, as a restarted pod behind its name would:
    they are kept for it as long as this object lives.
    ``prefix`` is a command that runs the server's own command as its arguments.
    """

    def __init__(self, name: str, folder: Path, *, prefix: Sequence[str] = (), **settings: str) -> None:
        self.name = name
        self._prefix = prefix
        self._folder = folder
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.metrics_port = 0

    @property
    def module(self) -> str:
        """What is run."""
        return f"services.{self.name}"

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server has written so far."""
        return (self._folder / f"{self.name}.log").read_text(errors="replace")

    def environment(self) -> Mapping[str, str]:
        """Environment of the process."""
        ready = self._folder / f"{self.name}.ready"
        settings = {
            "PORT": str(self.port),
            "METRICS_PORT": str(self.metrics_port),
            "ARTIFACT_URL": (self._folder / "artifacts").as_uri(),
            "CACHE_DIR": str(self._folder / "cache"),
            "READY_FILE": str(ready),
            "LOG_FORMAT": "json",
            "TORCH_THREADS": "1",
            "ONNX_THREADS": "1",
            **{key.upper(): value for key, value in self._settings.items()},
        }
        return os.environ | {f"GRANQ_{key}": value for key, value in settings.items()}

    def start(self) -> "ServerProcess":
        """Start, and return when it serves."""
        self.port = self.port or self._keep_port()
        self.metrics_port = self.metrics_port or self._keep_port()
        ready = self._folder / f"{self.name}.ready"
        ready.unlink(missing_ok=True)
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, sys.executable, "-m", self.module], env=self.environment(), stdout=log, stderr=log
            )
        deadline = time.monotonic() + READY_SECONDS
        while not ready.exists():
            assert self._process.poll() is None, f"{self.name} ended at once:\n{self.log}"
            assert time.monotonic() < deadline, f"{self.name} is not ready:\n{self.log}"
            time.sleep(0.02)
        bound = json.loads(ready.read_text())
        self.port, self.metrics_port = bound["port"], bound["metrics_port"]
        return self

    def _keep_port(self) -> int:
        """Return a port of the system's choice that nobody else is given, even while no server listens on it."""
        # Bound and not listening: the server, which reuses addresses as well, may listen; the system gives the port
        # neither to another that asks for any port nor to an outgoing connection.
        keeper = socket.socket()
        weakref.finalize(self, keeper.close)
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        return int(keeper.getsockname()[1])

    def children(self) -> list[psutil.Process]:
        """Processes that the server has started."""
        return list(psutil.Process(self.pid).children(recursive=True))

    def kill(self) -> None:
        """SIGKILL, and return when it is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def kill_if_alive(self) -> None:
        """SIGKILL, unless it has ended or was never started."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def wait(self, seconds: float | None = None) -> int:
        """Return the exit code of a server that ends by itself; raises TimeoutExpired when it has not after a time."""
        assert self._process is not None
        return self._process.wait(seconds)

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM; return the exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
