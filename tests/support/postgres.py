"""A PostgreSQL server of its own for tests, reachable by a socket in a temporary folder; no port is taken."""

import contextlib
import os
import pwd
import shutil
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


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """Start a server, yield the URL of its database, and stop it; skips where PostgreSQL is not installed."""
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    account = _account()
    # Under /tmp and short: the path of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="granq-pg-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        folder.chmod(0o755)
        if account is not None:
            shutil.chown(folder, account)
        data = folder / "data"
        initdb = ["initdb", "-D", str(data), "-A", "trust", "-U", "granq", "-E", "UTF8", "--no-sync"]
        subprocess.run(initdb, user=account, cwd=folder, check=True, capture_output=True)
        options = ["-c", "listen_addresses=", "-k", str(folder), "-c", "fsync=off"]
        server = subprocess.Popen(
            ["postgres", "-D", str(data), *options], user=account, cwd=folder, stderr=subprocess.DEVNULL
        )
        try:
            ready = ["pg_isready", "-h", str(folder), "-U", "granq", "-d", "postgres"]
            deadline = time.monotonic() + 30
            while subprocess.run(ready, capture_output=True, check=False).returncode != 0:
                assert time.monotonic() < deadline, "PostgreSQL did not start in time"
                assert server.poll() is None, "PostgreSQL ended at its start"
                time.sleep(0.05)
            yield f"postgresql://granq@/postgres?host={folder}"
        finally:
            server.terminate()
            server.wait(timeout=30)
