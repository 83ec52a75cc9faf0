"""Files of the store on this machine's file system, written so that a crash or a power cut never leaves half a file."""

import contextlib
import fcntl
import os
import time
import uuid
from pathlib import Path
from typing import BinaryIO

from services.common.artifacts.backend import storage_operation

_STAGING = "tmp"
# A file that is being written is locked, and the system lets go of the lock when its process dies. Between its making
# and its locking pass less seconds than these.
_ABANDONED_SECONDS = 60.0


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unless_missing(error: OSError) -> None:
    # A folder that cannot be read must not pass for an empty one: what it refers to would seem to be in no use.
    if not isinstance(error, FileNotFoundError):
        raise error


def _is_free(path: Path) -> bool:
    """Return whether no living process writes a file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        raise
    except OSError:
        return False
    return True


class LocalStaged:
    """A file under a temporary name on the same file system, so that a rename publishes it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.path = root / _STAGING / uuid.uuid4().hex
        with storage_operation("open", OSError):
            try:
                descriptor = self._create()
            except FileNotFoundError:  # Someone tidied up.
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = self._create()
            self._file = os.fdopen(descriptor, "wb")
            with contextlib.suppress(OSError):  # a file system without locks: nobody can take this for abandoned
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        self._ended = False

    def _create(self) -> int:
        # Blobs never change: read-only also for their owner, less the umask.
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)

    def write(self, data: bytes) -> None:
        """Append bytes."""
        with storage_operation("write", OSError):
            self._file.write(data)

    def flush(self) -> None:
        """Bring all bytes to the disk."""
        with storage_operation("flush", OSError):
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self, path: str) -> None:
        """Rename the file to its final path and bring the name to the disk."""
        self.flush()
        target = self._root / path
        with storage_operation("publish", OSError):
            self._file.close()
            changed = [target.parent]
            while not changed[-1].is_dir():
                changed.append(changed[-1].parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.path.replace(target)
            # A new folder's own name is in its parent, which must reach the disk, too.
            for folder in changed:
                _sync_folder(folder)
        self._ended = True

    def discard(self) -> None:
        """Remove the temporary file; does nothing after `publish`."""
        if self._ended:
            return
        self._ended = True
        self.path.unlink(missing_ok=True)
        with storage_operation("delete", OSError):
            # Closing flushes what is buffered, which fails on a full disk; the name is gone by then.
            self._file.close()


class LocalBackend:
    """A folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        with storage_operation("open", OSError):
            (root / _STAGING).mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()

    def _remove_abandoned(self) -> None:
        limit = time.time() - _ABANDONED_SECONDS
        for path in (self._root / _STAGING).iterdir():
            try:
                if path.stat().st_mtime < limit and _is_free(path):
                    path.unlink()
            except FileNotFoundError:
                continue  # Another process was faster.

    def stage(self) -> LocalStaged:
        """Begin a file."""
        return LocalStaged(self._root)

    def open(self, path: str) -> BinaryIO:
        """Open a file to read."""
        with storage_operation("open", OSError):
            return (self._root / path).open("rb")

    def size(self, path: str) -> int:
        """Return a file's length in bytes."""
        with storage_operation("stat", OSError):
            return (self._root / path).stat().st_size

    def replace(self, path: str, data: bytes) -> None:
        """Write a small file at once."""
        staged = self.stage()
        try:
            staged.write(data)
            staged.publish(path)
        finally:
            staged.discard()

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless there is one; return whether this call made it."""
        staged = self.stage()
        target = self._root / path
        try:
            staged.write(data)
            staged.flush()
            with storage_operation("replace", OSError):
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    # Unlike a rename, a link fails where the name is taken, on every file system and by network, too.
                    target.hardlink_to(staged.path)
                except FileExistsError:
                    return False
                _sync_folder(target.parent)
            return True
        finally:
            staged.discard()

    def delete(self, path: str) -> None:
        """Remove a file if it is there."""
        with storage_operation("delete", OSError):
            (self._root / path).unlink(missing_ok=True)

    def list(self, prefix: str) -> list[str]:
        """Return the paths of all files that begin with a prefix, sorted."""
        found = []
        with storage_operation("list", OSError):
            for folder, _, names in os.walk(self._root / prefix.rpartition("/")[0], onerror=_unless_missing):
                relative = Path(folder).relative_to(self._root)
                found += [(relative / name).as_posix() for name in names]
        return sorted(path for path in found if path.startswith(prefix))

    def ages(self, prefix: str) -> dict[str, float]:
        """Return the paths of all files that begin with a prefix, and how many seconds ago each was written."""
        found: dict[str, float] = {}
        for path in self.list(prefix):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                found[path] = self.age(path)
        return found

    def age(self, path: str) -> float:
        """Return how many seconds ago a file was written."""
        with storage_operation("stat", OSError):
            return time.time() - (self._root / path).stat().st_mtime

    def local_path(self, path: str) -> Path:
        """Return the file itself."""
        target = self._root / path
        if not target.is_file():
            raise FileNotFoundError(path)
        return target
