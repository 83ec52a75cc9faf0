"""A stream of a blob's bytes that notices damage while it is read."""

import hashlib
import io
from typing import BinaryIO

from services.common.artifacts.backend import storage_operation
from services.common.errors import DataLossError
from services.common.metrics import ARTIFACT_BYTES


def damaged(digest: str) -> DataLossError:
    """Return the error for stored bytes that do not match their digest."""
    return DataLossError(f"the stored bytes of {digest} are damaged; store the artifact again", reason="BLOB_DAMAGED")


class VerifyingReader(io.RawIOBase):
    """Reads a blob and, when it is read from first to last byte in order, compares its digest.

    The comparison comes with the last bytes, which are not handed out when they do not fit. A seek ends verification.
    """

    def __init__(self, file: BinaryIO, size: int, digest: str) -> None:
        super().__init__()
        self._file = file
        self._size = size
        self._digest = digest
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._in_order = True

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        """Read up to the buffer's length.

        Raises:
            DataLossError: The blob, read in order to its end, does not match its digest.
        """
        with storage_operation("read", Exception):
            # Straight into the buffer; every kind of store has it, though the type does not say so.
            count: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        ARTIFACT_BYTES.labels("read").inc(count)
        if self._in_order and len(buffer):
            self._hash.update(memoryview(buffer)[:count])
            self._hashed += count
            ended = self._hashed == self._size or count == 0
            if ended and f"sha256:{self._hash.hexdigest()}" != self._digest:
                raise damaged(self._digest)
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position; bytes read from there are not verified."""
        before = self._file.tell()
        after = self._file.seek(offset, whence)
        self._in_order = self._in_order and after == before
        return after

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    def close(self) -> None:
        """Close the underlying file."""
        if not self.closed:
            self._file.close()
        super().close()
