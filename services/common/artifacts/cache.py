"""Copies of a remote store's blobs: a bounded folder that all processes of one user on a machine may share."""

import contextlib
import fcntl
import os
import re
import struct
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.common.artifacts.backend import storage_operation
from services.common.artifacts.local import LocalBackend, LocalStaged
from services.common.metrics import CACHE_REMOVED_BYTES

_BLOBS = "blobs/"
_COPY = re.compile("[0-9a-f]{64}")  # beside them lie downloads on their way
# Bytes of this file are locked, and stand for blobs; nothing is ever written to it. Locks on the blobs themselves would
# tell nothing once a copy takes the place of another: whoever holds the old one reads the new one by its path.
_LOCKS = "in-use"
_PLACE_DIGITS = 15
_TRIMMING = 1 << 62  # beyond the places of all blobs
_FLOCK = struct.Struct("hhqqi4x")  # fcntl(2), on 64 bits
# A new time of use costs whoever verified a copy before a new verification, so it is not written at each use.
_STAMP_SECONDS = 60.0


def default_cache_dir() -> Path:
    """Return granq in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "granq"


def _lock(descriptor: int, command: int, kind: int, place: int) -> None:
    """Lock a byte for an open file, not for the process, as locks of other calls would be; raises OSError."""
    fcntl.fcntl(descriptor, command, _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0))


def _place(path: str) -> int:
    return int(path[-64:][:_PLACE_DIGITS], 16)


class CacheStaged(LocalStaged):
    """A file on its way into the cache."""

    def __init__(self, root: Path, cache: "CacheBackend") -> None:
        super().__init__(root)
        self._cache = cache

    def publish(self, path: str) -> None:
        """Rename the file to its final path; others make room for it."""
        super().publish(path)
        if path.startswith(_BLOBS):
            self._cache.trim()


class CacheBackend(LocalBackend):
    """A folder whose blobs are copies: those that were used longest ago go when all take more than a limit.

    A copy that a living process holds stays. The system lets go of what a process holds when it dies.

    Args:
        root: The folder.
        limit: Bytes that copies may take; more while more is held.
    """

    def __init__(self, root: Path, limit: int) -> None:
        super().__init__(root)
        self._limit = limit
        self._held = self._open_locks()
        weakref.finalize(self, os.close, self._held)

    def _open_locks(self) -> int:
        with storage_operation("open", OSError):
            return os.open(self._root / _LOCKS, os.O_RDWR | os.O_CREAT, 0o600)

    @contextmanager
    def _locks(self) -> Iterator[int]:
        descriptor = self._open_locks()
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def stage(self) -> LocalStaged:
        """Begin a file."""
        return CacheStaged(self._root, self)

    def local_path(self, path: str) -> Path:
        """Return the file itself, and note that it is used now."""
        target = super().local_path(path)
        if time.time() - target.stat().st_mtime > _STAMP_SECONDS:
            os.utime(target)
        return target

    def hold(self, path: str) -> None:
        """Keep a blob's copy, also one that is yet to come, as long as this object lives."""
        self._hold(self._held, path)

    @contextmanager
    def holding(self, path: str) -> Iterator[None]:
        """Keep a blob's copy for the block."""
        with self._locks() as descriptor:
            self._hold(descriptor, path)
            yield

    def _hold(self, descriptor: int, path: str) -> None:
        with contextlib.suppress(OSError):  # a file system without locks: nobody can remove anything there
            _lock(descriptor, fcntl.F_OFD_SETLKW, fcntl.F_RDLCK, _place(path))

    def trim(self) -> None:
        """Remove copies that nobody holds, those used longest ago first, until the others fit."""
        with self._locks() as descriptor:
            try:
                # One after the other: two that count the same files would remove twice as many.
                _lock(descriptor, fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, _TRIMMING)
            except OSError:
                return
            copies = self._copies()
            excess = sum(size for _, size, _ in copies) - self._limit
            for _, size, path in sorted(copies):
                if excess <= 0:
                    return
                try:
                    _lock(descriptor, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, _place(path))
                except OSError:
                    continue  # held
                self.delete(path)
                _lock(descriptor, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, _place(path))
                excess -= size
                CACHE_REMOVED_BYTES.inc(size)

    def _copies(self) -> list[tuple[float, int, str]]:
        """Return when each copy was used last, in seconds since 1970, its bytes and its path."""
        found = []
        for path in self.list(_BLOBS):
            if _COPY.fullmatch(path.rpartition("/")[2]):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    status = (self._root / path).stat()
                    found.append((status.st_mtime, status.st_size, path))
        return found
