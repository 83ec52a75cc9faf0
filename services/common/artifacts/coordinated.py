"""Files of the store behind the coordinator's ArtifactService, for a device that can reach neither folder nor bucket.

Blobs come and go through the coordinator, and stay here as copies. References are this device's own: what a job has
noted here is of use where its copies are.
"""

from pathlib import Path
from typing import BinaryIO

from granq.errors import GranqClientError
from granq.transfer import Transfers
from services.common.artifacts.backend import storage_operation
from services.common.artifacts.cache import CacheBackend
from services.common.artifacts.local import LocalStaged
from services.common.errors import CLASSES, GranqError, NotFoundError, UnavailableError
from services.common.rpc.artifact_client import open_transfers
from services.common.security import SecuritySettings

_BLOBS = "blobs/"


def digest_of_path(path: str) -> str:
    """Return the digest that a blob's path names."""
    return f"sha256:{path.rpartition('/')[2]}"


def _as_error(error: GranqClientError) -> GranqError:
    """Return what the coordinator told, as the rest of a job knows it."""
    number: int = error.code.value[0]
    # A transfer that another process of this device has begun, or that broke off: the next attempt goes on with it.
    cls = CLASSES.get(number, UnavailableError)
    return cls(error.message, reason=error.reason or None, field=error.field)


class CoordinatedStaged:
    """Bytes spooled on this device, sent when they are complete."""

    def __init__(self, spool: LocalStaged, transfers: Transfers) -> None:
        self._spool = spool
        self._transfers = transfers

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._spool.write(data)

    def publish(self, path: str) -> None:
        """Send the blob, then keep the spooled file as the local copy."""
        self._spool.flush()
        try:
            with storage_operation("publish", OSError):
                self._transfers.upload(self._spool.path, path.rpartition("/")[2], "", None)
        except GranqClientError as error:
            raise _as_error(error) from error
        self._spool.publish(path)

    def discard(self) -> None:
        """Remove the spooled file; does nothing after `publish`."""
        self._spool.discard()


class CoordinatedBackend:
    """Blobs of a coordinator's store, references of this device.

    Args:
        address: host:port of the coordinator.
        folder: Where copies and references are kept.
        files: The same folder as a backend.
        security: What this service shows to the coordinator; None for nothing, in plain text.
    """

    def __init__(self, address: str, folder: Path, files: CacheBackend, security: SecuritySettings | None) -> None:
        self._transfers = open_transfers(address, security)
        self._folder = folder
        self._files = files

    def stage(self) -> CoordinatedStaged:
        """Begin a blob."""
        return CoordinatedStaged(self._files.stage(), self._transfers)

    def open(self, path: str) -> BinaryIO:
        """Open a file to read; a blob that is not here yet is fetched, from where an earlier attempt broke off."""
        try:
            return self._files.open(path)
        except FileNotFoundError:
            if not path.startswith(_BLOBS):
                raise
        try:
            with self._files.holding(path):
                with storage_operation("open", OSError):
                    self._transfers.download(digest_of_path(path), self._folder / path, None)
                self._files.trim()
                return self._files.open(path)
        except GranqClientError as error:
            raise self._missing(path, error) from error

    def size(self, path: str) -> int:
        """Return a file's length in bytes."""
        try:
            return self._files.size(path)
        except FileNotFoundError:
            if not path.startswith(_BLOBS):
                raise
        try:
            with storage_operation("stat"):
                return self._transfers.stat(digest_of_path(path)).size_bytes
        except GranqClientError as error:
            raise self._missing(path, error) from error

    def _missing(self, path: str, error: GranqClientError) -> Exception:
        known = _as_error(error)
        return FileNotFoundError(path) if isinstance(known, NotFoundError) else known

    def replace(self, path: str, data: bytes) -> None:
        """Write a reference."""
        self._files.replace(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file beside the device's copies unless there is one; return whether this call made it."""
        return self._files.create(path, data)

    def delete(self, path: str) -> None:
        """Remove a reference if it is there."""
        self._files.delete(path)

    def list(self, prefix: str) -> list[str]:
        """Return the paths of all files of this device that begin with a prefix, sorted."""
        return self._files.list(prefix)

    def ages(self, prefix: str) -> dict[str, float]:
        """Return the paths of all files of this device that begin with a prefix, and their ages in seconds."""
        return self._files.ages(prefix)

    def age(self, path: str) -> float:
        """Return how many seconds ago a file of this device was written."""
        return self._files.age(path)
