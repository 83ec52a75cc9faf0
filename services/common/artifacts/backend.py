"""What the store asks of a place that keeps files, and how that place's failures are told."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Protocol

from services.common.errors import GranqError, UnavailableError, as_granq_error
from services.common.metrics import artifact_operation


class Staged(Protocol):
    """Bytes on their way in; nobody sees them before they are published under a name."""

    def write(self, data: bytes) -> None:
        """Append bytes."""

    def publish(self, path: str) -> None:
        """Make all of it visible under a path at once, in place of what was there."""

    def discard(self) -> None:
        """Drop the bytes; does nothing after `publish`."""


class Backend(Protocol):
    """A place that keeps files under relative paths with "/". Missing files raise FileNotFoundError."""

    def stage(self) -> Staged:
        """Begin a file."""

    def open(self, path: str) -> BinaryIO:
        """Open a file to read from its beginning; seekable."""

    def size(self, path: str) -> int:
        """Return a file's length in bytes."""

    def replace(self, path: str, data: bytes) -> None:
        """Write a small file so that readers see either the old or the new content."""

    def delete(self, path: str) -> None:
        """Remove a file; one that is not there is no error."""

    def list(self, prefix: str) -> list[str]:
        """Return the paths of all files that begin with a prefix, sorted."""


@contextmanager
def storage_operation(operation: str, *kinds: type[Exception]) -> Iterator[None]:
    """Count and time an operation, and tell failures of the storage as errors of the domain.

    Args:
        operation: One of `services.common.metrics.artifacts.OPERATIONS`.
        kinds: Exceptions that mean a failure of the storage.

    Raises:
        ResourceExhaustedError: The disk is full.
        UnavailableError: Anything else; the cause is chained, for the log.
    """
    try:
        with artifact_operation(operation):
            yield
    except (GranqError, FileNotFoundError):
        raise
    except kinds as error:
        if (known := as_granq_error(error)) is not None:
            raise known from error
        what = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise UnavailableError(f"the artifact store failed: {what}", reason="STORE_UNAVAILABLE") from error
