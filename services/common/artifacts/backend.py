"""What the store asks of a place that keeps files, and how that place's failures are told."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Protocol

from services.common.errors import (
    FailedPreconditionError,
    GranqError,
    ResourceExhaustedError,
    UnavailableError,
    as_granq_error,
)
from services.common.metrics import artifact_operation

# Codes of S3's protocol, which most object stores speak, for requests that no repetition makes good. A question for an
# object's size is answered without a code: 400 when the session has expired, else 403.
_DENIED = frozenset(
    {
        *("400", "403", "AccessDenied", "AllAccessDisabled", "AuthorizationHeaderMalformed", "ExpiredToken"),
        *("InvalidAccessKeyId", "InvalidToken", "NoCredentialsError", "PartialCredentialsError"),
        *("SignatureDoesNotMatch", "TokenRefreshRequired"),
    }
)
_MISSING = frozenset({"InvalidBucketName", "NoSuchBucket"})
_FULL = frozenset({"507", "EntityTooLarge", "QuotaExceeded", "XMinioStorageFull"})


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

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless there is one; return whether this call made it. Of several at once, one does."""

    def delete(self, path: str) -> None:
        """Remove a file; one that is not there is no error."""

    def list(self, prefix: str) -> list[str]:
        """Return the paths of all files that begin with a prefix, sorted."""

    def ages(self, prefix: str) -> dict[str, float]:
        """Return the paths of all files that begin with a prefix, and how many seconds ago each was written."""

    def age(self, path: str) -> float:
        """Return how many seconds ago a file was written."""


@contextmanager
def storage_operation(operation: str, *kinds: type[Exception]) -> Iterator[None]:
    """Count and time an operation, and tell failures of the storage as errors of the domain.

    They are told in words of ours: those of a library may quote keys and addresses.

    Args:
        operation: One of `services.common.metrics.artifacts.OPERATIONS`.
        kinds: Exceptions that mean a failure of the storage.

    Raises:
        FileNotFoundError: The file is not there.
        ResourceExhaustedError: The disk, or the bucket's quota, is full.
        FailedPreconditionError: The bucket does not exist, or the store does not take the credentials.
        UnavailableError: Anything else; the cause is chained, for the log.
    """
    try:
        with artifact_operation(operation):
            yield
    except GranqError:
        raise
    except kinds as error:
        known = _refusal(error) or as_granq_error(error)
        if known is None and isinstance(error, FileNotFoundError):
            raise
        if known is not None:
            raise known from error
        what = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise UnavailableError(f"the artifact store failed: {what}", reason="STORE_UNAVAILABLE") from error


def _refusal(error: BaseException) -> GranqError | None:
    """Return the error for an object store's answer that stays the same however often it is asked."""
    codes: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        codes.add(type(cause).__name__)
        response = getattr(cause, "response", None)  # of botocore's ClientError
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code")))
            codes.add(str(response.get("ResponseMetadata", {}).get("HTTPStatusCode")))
        cause = cause.__cause__
    if codes & _FULL:
        return ResourceExhaustedError(
            "the artifact store is full; free space or raise its quota, and try again", reason="DISK_FULL"
        )
    if codes & _MISSING:
        return FailedPreconditionError(
            "the artifact store's bucket does not exist; create it, or correct GRANQ_ARTIFACT_URL",
            reason="STORE_MISSING",
        )
    if codes & _DENIED:
        return FailedPreconditionError(
            "the artifact store refuses this server's credentials; check them, and that they allow to read, write, "
            "list and delete",
            reason="STORE_DENIED",
        )
    return None
