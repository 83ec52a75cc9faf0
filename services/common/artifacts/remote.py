"""Files of the store in a bucket, through fsspec. Objects appear whole there, so no rename is needed."""

from datetime import UTC, datetime
from typing import Any, BinaryIO, cast

from fsspec.core import url_to_fs

from services.common.artifacts.backend import storage_operation
from services.common.artifacts.local import LocalBackend, LocalStaged
from services.common.errors import FailedPreconditionError

# How the drivers call the time of the last write; the first that is there counts.
_WRITTEN = ("LastModified", "mtime", "updated", "last_modified", "created")


class RemoteStaged:
    """Bytes spooled on this machine: an object's key is its digest, which is known only after the last byte."""

    def __init__(self, spool: LocalStaged, fs: Any, root: str) -> None:
        self._spool = spool
        self._fs = fs
        self._root = root

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._spool.write(data)

    def publish(self, path: str) -> None:
        """Upload, then keep the spooled file as the local copy: whoever wrote it often reads it next."""
        self._spool.flush()
        with storage_operation("publish", Exception):
            self._fs.put_file(str(self._spool.path), f"{self._root}/{path}")
        self._spool.publish(path)

    def discard(self) -> None:
        """Remove the spooled file; does nothing after `publish`."""
        self._spool.discard()


class RemoteBackend:
    """A bucket, or any other place that fsspec knows by URL."""

    def __init__(self, url: str, cache: LocalBackend) -> None:
        self._cache = cache
        # Every kind of bucket raises its own library's exceptions, so all of them count as failures of the storage.
        with storage_operation("open", Exception):
            try:
                # Other processes write to the same bucket: a remembered listing would hide their work.
                fs, root = url_to_fs(url, use_listings_cache=False)
            except ImportError as error:
                scheme = url.partition(":")[0]
                raise FailedPreconditionError(
                    f"stores at {scheme}:// need a driver that is not installed: {error}", reason="STORE_DRIVER_MISSING"
                ) from error
        self._fs: Any = fs
        self._root = str(root).rstrip("/")

    def _key(self, path: str) -> str:
        return f"{self._root}/{path}"

    def stage(self) -> RemoteStaged:
        """Begin an object."""
        return RemoteStaged(self._cache.stage(), self._fs, self._root)

    def open(self, path: str) -> BinaryIO:
        """Open an object to read."""
        with storage_operation("open", Exception):
            return cast(BinaryIO, self._fs.open(self._key(path), "rb"))

    def size(self, path: str) -> int:
        """Return an object's length in bytes."""
        with storage_operation("stat", Exception):
            return int(self._fs.info(self._key(path))["size"])

    def replace(self, path: str, data: bytes) -> None:
        """Write a small object at once."""
        with storage_operation("replace", Exception):
            self._fs.pipe_file(self._key(path), data)

    def create(self, path: str, data: bytes) -> bool:
        """Write a small object unless there is one; return whether this call made it."""
        with storage_operation("replace", Exception):
            try:
                self._fs.pipe_file(self._key(path), data, mode="create")
            except FileExistsError:
                return False
        return True

    def delete(self, path: str) -> None:
        """Remove an object if it is there."""
        try:
            with storage_operation("delete", Exception):
                self._fs.rm_file(self._key(path))
        except FileNotFoundError:
            return

    def list(self, prefix: str) -> list[str]:
        """Return the paths of all objects that begin with a prefix, sorted."""
        try:
            with storage_operation("list", Exception):
                keys = self._fs.find(self._key(prefix.rpartition("/")[0]))
        except FileNotFoundError:
            return []
        start = len(self._root) + 1
        return sorted(key[start:] for key in keys if key[start:].startswith(prefix))

    def ages(self, prefix: str) -> dict[str, float]:
        """Return the paths of all objects that begin with a prefix, and how many seconds ago each was written."""
        try:
            with storage_operation("list", Exception):
                found = self._fs.find(self._key(prefix.rpartition("/")[0]), detail=True)
        except FileNotFoundError:
            return {}
        start = len(self._root) + 1
        return {key[start:]: _age(info) for key, info in found.items() if key[start:].startswith(prefix)}

    def age(self, path: str) -> float:
        """Return how many seconds ago an object was written."""
        with storage_operation("stat", Exception):
            return _age(self._fs.info(self._key(path)))


def _age(info: dict[str, Any]) -> float:
    """Return the age of an object in seconds; 0, so that nobody takes it for old, where the driver does not tell it."""
    written = next((info[name] for name in _WRITTEN if info.get(name) is not None), None)
    if isinstance(written, str):
        written = datetime.fromisoformat(written)
    if isinstance(written, datetime):
        written = (written if written.tzinfo else written.replace(tzinfo=UTC)).timestamp()
    return 0.0 if written is None else datetime.now(UTC).timestamp() - float(written)
