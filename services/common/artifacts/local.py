"""Files of the store on this machine's file system, written so that a crash or a power cut never leaves half a file."""

import os
import time
import uuid
from pathlib import Path
from typing import BinaryIO

from services.common.artifacts.backend import storage_operation

_STAGING = "tmp"
# No upload takes this long; what is older was left by a process that died.
_ABANDONED_SECONDS = 24 * 3600


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
                if path.stat().st_mtime < limit:
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

    def local_path(self, path: str) -> Path:
        """Return the file itself."""
        target = self._root / path
        if not target.is_file():
            raise FileNotFoundError(path)
        return target
