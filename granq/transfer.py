"""Moves blobs to and from the artifact store: chunked, checked by sha256, resumable."""

import contextlib
import fcntl
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, BinaryIO

import grpc

from granq.channel import Backoff
from granq.errors import GranqClientError, from_rpc_error
from granq.v1 import artifacts_pb2, artifacts_pb2_grpc

CHUNK_BYTES = 1024 * 1024
ATTEMPTS = 5
# A transfer's deadline grows with its size, so that a stalled one ends and a slow one does not.
SLOWEST_BYTES_PER_SECOND = 64 * 1024
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

Progress = Callable[[int, int], None]


def digest_of(stream: IO[bytes]) -> str:
    """Return "sha256:" and the hexadecimal digest of what is left in ``stream``."""
    return _name(_sha256_of(stream))


def _sha256_of(stream: IO[bytes]) -> "hashlib._Hash":
    sha256 = hashlib.sha256()
    while chunk := stream.read(CHUNK_BYTES):
        sha256.update(chunk)
    return sha256


def _name(sha256: "hashlib._Hash") -> str:
    return f"sha256:{sha256.hexdigest()}"


class Transfers:
    """Uploads and downloads over one stub.

    Args:
        stub: Stub of the artifact service.
        timeout: Deadline in seconds of a unary call, and what a stream gets on top of its size's share.
    """

    def __init__(self, stub: artifacts_pb2_grpc.ArtifactServiceStub, timeout: float) -> None:
        self._stub, self._timeout = stub, timeout

    def upload(
        self, source: str | os.PathLike[str] | bytes, name: str, media_type: str, progress: Progress | None
    ) -> artifacts_pb2.Artifact:
        """Store a file or bytes; content that the server holds is not sent again."""
        with contextlib.ExitStack() as stack:
            if isinstance(source, bytes):
                stream: BinaryIO = io.BytesIO(source)
            else:
                stream = stack.enter_context(open(source, "rb"))
                name = name or Path(source).name
            digest = digest_of(stream)
            size = stream.tell()
            header = artifacts_pb2.UploadHeader(digest=digest, size_bytes=size, name=name, media_type=media_type)
            if self._holds(digest):
                if progress:
                    progress(size, size)
                return artifacts_pb2.Artifact(digest=digest, size_bytes=size, name=name, media_type=media_type)
            backoff = Backoff()
            for attempt in range(1, ATTEMPTS + 1):
                stream.seek(0)
                messages = _upload_messages(header, stream, progress)
                try:
                    return self._stub.UploadArtifact(messages, timeout=self._deadline(size)).artifact
                except grpc.RpcError as error:
                    failure = from_rpc_error(error)
                    if failure.code not in _BROKEN or attempt == ATTEMPTS:
                        raise failure from error
                time.sleep(backoff.next())
        raise AssertionError("the last attempt returns or raises")

    def stat(self, digest: str) -> artifacts_pb2.Artifact:
        """Return digest and size of a stored blob."""
        request = artifacts_pb2.GetArtifactRequest(digest=digest)
        try:
            return self._stub.GetArtifact(request, timeout=self._timeout).artifact
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def download(self, digest: str, path: Path, progress: Progress | None) -> Path:
        """Write a blob to ``path``; the file appears there complete and checked, or not at all."""
        size = self.stat(digest).size_bytes
        if path.is_file() and path.stat().st_size == size:
            with path.open("rb") as present:
                if digest_of(present) == digest:
                    if progress:
                        progress(size, size)
                    return path
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{digest[-12:]}.part")
        with part.open("a+b") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                text = f"another process is downloading to {path}"
                raise GranqClientError(grpc.StatusCode.ABORTED, text, reason="DOWNLOAD_IN_PROGRESS") from error
            resumed = stream.seek(0, os.SEEK_END) > 0
            correct = self._fill(digest, size, stream, progress)
            if not correct and resumed:
                # The earlier part may be damaged (a crash before its bytes reached the disk): once from the start.
                stream.truncate(0)
                correct = self._fill(digest, size, stream, progress)
            if not correct:
                part.unlink()
                text = f"what the server sent for {digest} has another digest; nothing was kept"
                raise GranqClientError(grpc.StatusCode.DATA_LOSS, text, reason="DIGEST_MISMATCH")
            stream.flush()
            os.fsync(stream.fileno())
            part.replace(path)
        return path

    def _fill(self, digest: str, size: int, stream: BinaryIO, progress: Progress | None) -> bool:
        """Append to ``stream`` what it lacks of the blob; return whether it then has the blob's size and digest."""
        backoff, attempt = Backoff(), 0
        if stream.seek(0, os.SEEK_END) > size:
            stream.truncate(0)
        stream.seek(0)
        sha256 = _sha256_of(stream)

        def keep(chunk: bytes) -> None:
            stream.write(chunk)
            sha256.update(chunk)

        while True:
            done = before = stream.seek(0, os.SEEK_END)
            request = artifacts_pb2.DownloadArtifactRequest(digest=digest, offset=done)
            keeping: Future[None] | None = None
            try:
                # Each chunk is written and hashed while the next one arrives. Leaving the pool waits for the last.
                with ThreadPoolExecutor(1) as pool:
                    for message in self._stub.DownloadArtifact(request, timeout=self._deadline(size - done)):
                        chunk = message.chunk  # each look at the field copies its bytes
                        if keeping:
                            keeping.result()
                        keeping = pool.submit(keep, chunk)
                        done += len(chunk)
                        if progress:
                            progress(done, size)
                    if keeping:
                        keeping.result()
                break
            except grpc.RpcError as error:
                if keeping:
                    keeping.result()
                failure = from_rpc_error(error)
                # Progress resets the count: a long download may break more often than a short one.
                attempt = 1 if done > before else attempt + 1
                if failure.code not in _BROKEN or attempt >= ATTEMPTS:
                    raise failure from error
                time.sleep(backoff.next())
        return done == size and _name(sha256) == digest

    def _holds(self, digest: str) -> bool:
        try:
            self.stat(digest)
        except GranqClientError as error:
            if error.code != grpc.StatusCode.NOT_FOUND:
                raise
            return False
        return True

    def _deadline(self, size: int) -> float:
        return self._timeout + size / SLOWEST_BYTES_PER_SECOND


def _upload_messages(
    header: artifacts_pb2.UploadHeader, stream: BinaryIO, progress: Progress | None
) -> Iterator[artifacts_pb2.UploadArtifactRequest]:
    yield artifacts_pb2.UploadArtifactRequest(header=header)
    done = 0
    while chunk := stream.read(CHUNK_BYTES):
        yield artifacts_pb2.UploadArtifactRequest(chunk=chunk)
        done += len(chunk)
        if progress:
            progress(done, header.size_bytes)
