"""A PostgreSQL server of its own for tests, reachable by a socket in a temporary folder; no port is taken."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def _account() -> str | None:
    """Return the account that the server must run as: PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    pytest.skip("PostgreSQL does not run as root, and there is no account postgres or nobody")


class PostgresServer:
    """A server on a data folder.

    Args:
        folder: Folder of the data and of the socket.
        account: Account that it runs as; None for this one.
    """

    def __init__(self, folder: Path, account: str | None) -> None:
        self._folder = folder
        self._account = account
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql://granq@/postgres?host={folder}"
        initdb = ["initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "granq", "-E", "UTF8", "--no-sync"]
        subprocess.run(initdb, user=account, cwd=folder, check=True, capture_output=True)

    def start(self) -> None:
        """Start, and return when it takes connections.

        Begins again as long as the server leaves: after a hard stop the last process may not have let go of the
        shared memory yet, and a service manager would try again, too.
        """
        ready = ["pg_isready", "-h", str(self._folder), "-U", "granq", "-d", "postgres"]
        deadline = time.monotonic() + 30
        self._begin()
        while subprocess.run(ready, capture_output=True, check=False).returncode != 0:
            assert time.monotonic() < deadline, f"PostgreSQL did not start in time: {self._log.read_text()[-2000:]}"
            if self._process is None or self._process.poll() is not None:
                self._begin()
            time.sleep(0.05)

    def _begin(self) -> None:
        options = ["-c", "listen_addresses=", "-k", str(self._folder), "-c", "fsync=off"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["postgres", "-D", str(self._folder / "data"), *options],
                user=self._account,
                cwd=self._folder,
                stderr=log,
            )

    def stop(self) -> None:
        """End at once and break all connections, as a failed machine would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=30)


@contextlib.contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Start a server, yield it, and stop it; skips where PostgreSQL is not installed."""
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    account = _account()
    # Short, because the path of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="granq-pg-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        folder.chmod(0o755)
        if account is not None:
            shutil.chown(folder, account)
        server = PostgresServer(folder, account)
        server.start()
        try:
            yield server
        finally:
            server.stop()
