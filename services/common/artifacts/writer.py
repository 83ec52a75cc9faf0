"""What a blob's bytes go through on their way into a store."""

import hashlib
from types import TracebackType
from typing import Self

from granq.v1 import artifacts_pb2
from services.common.artifacts.backend import Staged
from services.common.artifacts.names import blob_path
from services.common.metrics import ARTIFACT_BYTES


class ArtifactWriter:
    """Takes a blob's bytes; a context manager that drops them unless `commit` was called."""

    def __init__(self, staged: Staged, name: str, media_type: str) -> None:
        self._staged = staged
        self._name = name
        self._media_type = media_type
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    @property
    def digest(self) -> str:
        """Digest of the bytes so far, as an artifact names it."""
        return f"sha256:{self._hash.hexdigest()}"

    def write(self, data: bytes) -> int:
        """Append bytes and return their number.

        Raises:
            ResourceExhaustedError: The disk is full.
            UnavailableError: The store cannot be reached.
        """
        self._staged.write(data)
        self._hash.update(data)
        self.size_bytes += len(data)
        ARTIFACT_BYTES.labels("write").inc(len(data))
        return len(data)

    def commit(self) -> artifacts_pb2.Artifact:
        """Make the blob visible and return it; raises as `write` does."""
        self._staged.publish(blob_path(self.digest))
        return artifacts_pb2.Artifact(
            digest=self.digest, size_bytes=self.size_bytes, name=self._name, media_type=self._media_type
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._staged.discard()
