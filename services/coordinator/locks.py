"""A lock per executor id: proof that one coordinator process, and only one, drives the pipelines of that id.

The operating system (a file lock beside an SQLite database) or PostgreSQL (an advisory lock of a session) releases it
in the moment the process dies, however it dies. So there is no heartbeat to write and no lease to wait for, and whoever
can take the lock of another id knows that its holder is gone.
"""

import fcntl
import hashlib
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from services.common.errors import FailedPreconditionError
from services.coordinator.database import sqlite_path


class ExecutorLock(Protocol):
    """Lock that a process holds on an executor id."""

    def try_acquire(self) -> bool:
        """Take the lock when it is free; return whether this object holds it now."""

    def release(self) -> None:
        """Let the lock go; nothing happens when it is not held."""


class FileLock:
    """Executor lock for SQLite: flock on a file beside the database."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock when it is free; return whether this object holds it now."""
        if self._descriptor is not None:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Let the lock go. The file stays: removing it could split the lock between two processes."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class AdvisoryLock:
    """Executor lock for PostgreSQL: a session's advisory lock on a connection of its own."""

    def __init__(self, url: URL, executor_id: str) -> None:
        # A dead machine closes no connection; the server notices it by keepalives within about half a minute.
        keepalive = "-c tcp_keepalives_idle=15 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
        arguments = {"connect_timeout": 10, "options": keepalive}
        self._engine = create_engine(url, poolclass=NullPool, connect_args=arguments)
        self._key = int.from_bytes(hashlib.sha256(f"granq.executor/{executor_id}".encode()).digest()[:8], signed=True)
        self._connection: Connection | None = None

    def try_acquire(self) -> bool:
        """Take the lock when it is free; return whether this object holds it now.

        A lock that was held goes when the connection breaks; this is noticed here, and the lock taken again.

        Raises:
            DBAPIError: The database cannot be reached.
        """
        if self._connection is not None:
            try:
                self._connection.execute(text("SELECT 1"))
            except DBAPIError:
                self.release()
            else:
                return True
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": self._key}):
            connection.close()
            return False
        self._connection = connection
        return True

    def release(self) -> None:
        """Let the lock go by closing its session."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            try:
                connection.close()
            except DBAPIError:
                connection.invalidate()  # the server went away, and the lock with it


class ExecutorLocks:
    """The locks of one database.

    Example:
        >>> locks = ExecutorLocks(url)  # doctest: +SKIP
        >>> with locks.hold("coordinator-0", 10.0):  # doctest: +SKIP
        ...     locks.is_live("coordinator-1")
        False
    """

    def __init__(self, url: URL) -> None:
        self._url = url

    def lock(self, executor_id: str) -> ExecutorLock:
        """Return the lock of one id, not held yet."""
        path = sqlite_path(self._url)
        if path is None:
            return AdvisoryLock(self._url, executor_id)
        name = hashlib.sha256(executor_id.encode()).hexdigest()[:16]
        return FileLock(path.with_name(f"{path.name}.{name}.lock"))

    def hold(self, executor_id: str, patience_seconds: float) -> "HeldLock":
        """Take the lock of this process.

        Args:
            executor_id: Id of this coordinator.
            patience_seconds: How long a predecessor may still hold it, for example while it shuts down.

        Raises:
            FailedPreconditionError: Another living process holds it.
        """
        lock = self.lock(executor_id)
        deadline = time.monotonic() + patience_seconds
        while not lock.try_acquire():
            if time.monotonic() >= deadline:
                raise FailedPreconditionError(
                    f"another coordinator with executor_id {executor_id!r} is running on this database; stop it, or "
                    "give this one another executor_id",
                    field="executor_id",
                )
            time.sleep(0.1)
        return HeldLock(lock)

    def is_live(self, executor_id: str) -> bool:
        """Return whether some process holds the lock of this id."""
        lock = self.lock(executor_id)
        free = lock.try_acquire()
        lock.release()
        return not free


class HeldLock:
    """A lock that is held until close."""

    def __init__(self, lock: ExecutorLock) -> None:
        self._lock = lock

    def renew(self) -> bool:
        """Return whether the lock is held, after taking it again if the database lost it meanwhile.

        Raises:
            DBAPIError: The database cannot be reached.
        """
        return self._lock.try_acquire()

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
