"""One container as an engine would run it, made of Linux namespaces: read-only root, a plain user, no rights."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ENTER = Path(__file__).with_name("enter.py")
# As Docker and Kubernetes give it.
_SHM_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class ImageConfig:
    """What an image says about running it."""

    entrypoint: tuple[str, ...]
    healthcheck: tuple[str, ...]
    environment: dict[str, str]
    user: str
    folder: str


class Container:
    """A running image.

    Args:
        root: The image's files.
        config: How to run it.
        data: Folder for /data, owned by the image's user.
        environment: Variables besides the image's own.
        network_of: Container whose network this one shares, as in a pod; None gives it a loopback of its own.
        log: File that takes what the server writes.
    """

    def __init__(
        self,
        root: Path,
        config: ImageConfig,
        data: Path,
        log: Path,
        environment: dict[str, str] | None = None,
        network_of: "Container | None" = None,
    ) -> None:
        self._root = root
        self._config = config
        self._environment = {**config.environment, **(environment or {})}
        self._log = log
        shared = ["nsenter", f"--net=/proc/{network_of.pid}/ns/net"] if network_of is not None else []
        network = [] if network_of is not None else ["--net"]
        command = [*shared, "unshare", "--mount", "--ipc", "--uts", "--pid", *network, "--fork", "--kill-child"]
        command += ["/bin/sh", "-euc", _SETUP, "sh", str(root), str(data), str(_SHM_BYTES)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - the command is put together above
                [*command, *self._enter(config.entrypoint)], stdout=output, stderr=subprocess.STDOUT
            )
        self.pid: int = self._child()

    def _child(self) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self._process.poll() is None:
            if found := children.read_text().split():
                return int(found[0])
            time.sleep(0.01)
        raise RuntimeError(f"the namespaces could not be made:\n{self.log()}")

    def _enter(self, arguments: Sequence[str]) -> list[str]:
        pairs = [f"{name}={value}" for name, value in self._environment.items()]
        place = [str(self._root), self._config.user, self._config.folder or "/"]
        return [sys.executable, str(_ENTER), *place, *pairs, "--", *arguments]

    def run(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as its user."""
        namespaces = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--ipc", "--uts", "--pid"]
        command = [*namespaces, *self._enter(arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)  # noqa: S603

    def wait_healthy(self, timeout: float) -> float:
        """Ask by the image's own HEALTHCHECK until it passes, and return the seconds since the call.

        Raises:
            RuntimeError: The server ended, or the time is up; with its log.
        """
        began = time.monotonic()
        while time.monotonic() - began < timeout:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}:\n{self.log()}")
            if self.run(*self._config.healthcheck).returncode == 0:
                return time.monotonic() - began
        raise RuntimeError(f"not healthy after {timeout:.0f} s:\n{self.log()}")

    def memory_bytes(self) -> int:
        """Return the resident memory of the server's process."""
        fields = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def log(self) -> str:
        """Return what the server has written."""
        return self._log.read_text(errors="replace")[-4000:]

    def stop(self, timeout: float = 60) -> int:
        """Send SIGTERM, wait, and return the exit code; a server that does not end is killed."""
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGTERM)
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


# $1 root, $2 data, $3 bytes of /dev/shm; what follows is executed. Mounts go with the mount namespace.
_SETUP = """
mount --make-rprivate /
root=$1 data=$2 shm=$3
shift 3
ip link set lo up 2>/dev/null || true
mount --bind "$root" "$root"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o "mode=1777,size=$shm" tmpfs "$root/dev/shm"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount --bind "$data" "$root/data"
mount -o remount,bind,ro "$root"
exec "$@"
"""
