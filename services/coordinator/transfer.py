"""Moves blobs between streams of messages and the artifact store, one chunk at a time."""

from collections.abc import AsyncGenerator, AsyncIterator

from granq.v1 import artifacts_pb2
from services.common.artifacts import ArtifactStore, ArtifactWriter
from services.common.errors import InvalidArgumentError, ResourceExhaustedError
from services.coordinator.retention import note_upload
from services.coordinator.threads import Threads

CHUNK_BYTES = 1024 * 1024


class ArtifactTransfer:
    """Uploads to and downloads from a store.

    Args:
        store: The store.
        threads: Where its blocking calls run.
        max_bytes: Largest upload.
    """

    def __init__(self, store: ArtifactStore, threads: Threads, max_bytes: int) -> None:
        self._store = store
        self._threads = threads
        self._max_bytes = max_bytes

    async def receive(self, messages: AsyncIterator[artifacts_pb2.UploadArtifactRequest]) -> artifacts_pb2.Artifact:
        """Store the blob that a header and its chunks make up; an upload that breaks off or is wrong leaves nothing.

        Raises:
            InvalidArgumentError: The messages are out of order, or the content is not what the header declares.
            ResourceExhaustedError: The blob is larger than allowed, or the store is full.
        """
        first = await anext(messages, None)
        if first is None or first.WhichOneof("payload") != "header":
            raise InvalidArgumentError("the first message must carry the header", field="header")
        header = first.header
        self._check_limit(header.size_bytes)
        writers: list[ArtifactWriter] = []

        def stage() -> None:
            writers.append(self._store.writer(header.name, header.media_type))

        try:
            # Not returned but noted, so that it is dropped, too, when the client goes away at this very moment.
            await self._threads.call(stage)
            writer = writers[0]
            arrived = 0
            # Each chunk is written and hashed while the next one arrives.
            async with self._threads.ahead() as writing:
                async for message in messages:
                    if message.WhichOneof("payload") != "chunk":
                        raise InvalidArgumentError("only the first message may carry a header", field="header")
                    chunk = message.chunk  # each look at the field copies its bytes
                    arrived += len(chunk)
                    self._check_limit(arrived)
                    if 0 < header.size_bytes < arrived:
                        raise InvalidArgumentError(
                            f"the header declares {header.size_bytes} bytes, but more arrived",
                            field="header.size_bytes",
                        )
                    await writing.then(writer.write, chunk)
                await writing.result()
            _check_content(header, writer)
            artifact = await self._threads.call(writer.commit)
            await self._threads.call(note_upload, self._store, artifact.digest)
            return artifact
        finally:
            # Drops what was not committed, also when the client went away.
            for writer in writers:
                await self._threads.call(writer.__exit__, None, None, None)

    async def send(self, digest: str, offset: int) -> AsyncGenerator[artifacts_pb2.DownloadArtifactResponse, None]:
        """Yield a blob's bytes from an offset; at least one message, so that the size of an empty rest is told, too.

        Raises:
            NotFoundError: The store does not hold it.
            InvalidArgumentError: The offset is beyond its end.
            DataLossError: The stored bytes do not match the digest.
        """
        size = (await self._threads.call(self._store.stat, digest)).size_bytes
        file = await self._threads.call(self._store.open, digest, offset)
        try:
            sent = False
            # Each chunk is read and hashed while the one before is sent.
            async with self._threads.ahead() as reading:
                await reading.then(file.read, CHUNK_BYTES)
                while chunk := await reading.then(file.read, CHUNK_BYTES):
                    yield artifacts_pb2.DownloadArtifactResponse(size_bytes=size, chunk=chunk)
                    sent = True
            if not sent:
                yield artifacts_pb2.DownloadArtifactResponse(size_bytes=size)
        finally:
            await self._threads.call(file.close)

    async def stat(self, digest: str) -> artifacts_pb2.Artifact:
        """Return a blob's identity, or raise NotFoundError."""
        return await self._threads.call(self._store.stat, digest)

    def _check_limit(self, size: int) -> None:
        if size > self._max_bytes:
            raise ResourceExhaustedError(
                f"this server takes blobs of up to {self._max_bytes} bytes; use the store directly for larger ones",
                reason="ARTIFACT_TOO_LARGE",
                field="header.size_bytes",
            )


def _check_content(header: artifacts_pb2.UploadHeader, writer: ArtifactWriter) -> None:
    if header.size_bytes and writer.size_bytes != header.size_bytes:
        raise InvalidArgumentError(
            f"the header declares {header.size_bytes} bytes, but {writer.size_bytes} arrived",
            reason="SIZE_MISMATCH",
            field="header.size_bytes",
        )
    if header.digest and writer.digest != header.digest:
        raise InvalidArgumentError(
            f"the header declares {header.digest}, but the content has {writer.digest}",
            reason="DIGEST_MISMATCH",
            field="header.digest",
        )
