"""Uploads and downloads: what arrives is what was sent, or nothing is stored."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from granq.v1 import artifacts_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import (
    DataLossError,
    GranqError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from services.coordinator.threads import Threads
from services.coordinator.transfer import CHUNK_BYTES, ArtifactTransfer

Message = artifacts_pb2.UploadArtifactRequest
Header = artifacts_pb2.UploadHeader
LIMIT = 8 * CHUNK_BYTES


@pytest.fixture
def transfer(store: ArtifactStore, threads: Threads) -> ArtifactTransfer:
    return ArtifactTransfer(store, threads, LIMIT)


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


async def _stream(*parts: Header | bytes) -> AsyncIterator[Message]:
    for part in parts:
        yield Message(chunk=part) if isinstance(part, bytes) else Message(header=part)


async def _download(
    transfer: ArtifactTransfer, digest: str, offset: int = 0
) -> list[artifacts_pb2.DownloadArtifactResponse]:
    return [message async for message in transfer.send(digest, offset)]


def _files(folder: Path) -> list[Path]:
    return [path for path in (folder / "artifacts").rglob("*") if path.is_file()]


async def test_a_round_trip_keeps_every_byte(transfer: ArtifactTransfer) -> None:
    content = os.urandom(2 * CHUNK_BYTES + 17)
    header = Header(digest=_digest(content), size_bytes=len(content), name="model.pt2", media_type="a/b")
    stored = await transfer.receive(_stream(header, content[:CHUNK_BYTES], b"", content[CHUNK_BYTES:]))
    assert stored == artifacts_pb2.Artifact(
        digest=header.digest, size_bytes=len(content), name="model.pt2", media_type="a/b"
    )
    for offset in (0, 1, CHUNK_BYTES, len(content) - 1, len(content)):
        messages = await _download(transfer, stored.digest, offset)
        assert b"".join(message.chunk for message in messages) == content[offset:]
        assert all(message.size_bytes == len(content) for message in messages)
        assert all(len(message.chunk) <= CHUNK_BYTES for message in messages)
    assert (await transfer.stat(stored.digest)).size_bytes == len(content)


async def test_an_empty_blob_is_a_blob(transfer: ArtifactTransfer) -> None:
    stored = await transfer.receive(_stream(Header()))
    assert [(m.size_bytes, m.chunk) for m in await _download(transfer, stored.digest)] == [(0, b"")]


@pytest.mark.parametrize(
    ("parts", "error", "field"),
    [
        ((), InvalidArgumentError, "header"),
        ((b"abc",), InvalidArgumentError, "header"),
        ((Header(), b"abc", Header()), InvalidArgumentError, "header"),
        ((Header(size_bytes=4), b"abc"), InvalidArgumentError, "header.size_bytes"),
        ((Header(size_bytes=2), b"abc"), InvalidArgumentError, "header.size_bytes"),
        ((Header(digest=_digest(b"abd")), b"abc"), InvalidArgumentError, "header.digest"),
        ((Header(size_bytes=LIMIT + 1),), ResourceExhaustedError, "header.size_bytes"),
        ((Header(), *[bytes(CHUNK_BYTES)] * 9), ResourceExhaustedError, "header.size_bytes"),
    ],
)
async def test_wrong_uploads_leave_nothing(
    transfer: ArtifactTransfer, tmp_path: Path, parts: tuple[Header | bytes, ...], error: type[GranqError], field: str
) -> None:
    with pytest.raises(error) as caught:
        await transfer.receive(_stream(*parts))
    assert caught.value.field == field
    assert _files(tmp_path) == []


async def test_an_aborted_upload_leaves_nothing(transfer: ArtifactTransfer, tmp_path: Path) -> None:
    arrived = asyncio.Event()

    async def stalling() -> AsyncIterator[Message]:
        yield Message(header=Header())
        yield Message(chunk=bytes(CHUNK_BYTES))
        arrived.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(transfer.receive(stalling()))
    await arrived.wait()
    assert len(_files(tmp_path)) == 1  # the bytes so far, under a temporary name
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert _files(tmp_path) == []


@pytest.mark.parametrize("offset", [0, 5])
async def test_damage_is_told_before_the_last_byte(
    transfer: ArtifactTransfer, store: ArtifactStore, offset: int
) -> None:
    stored = store.put_bytes(b"0123456789")
    path = store.local_path(stored.digest)
    path.chmod(0o644)
    path.write_bytes(b"012345678X")
    with pytest.raises(DataLossError):
        await _download(transfer, stored.digest, offset)


async def test_unknown_blobs_and_offsets_beyond_the_end(transfer: ArtifactTransfer, store: ArtifactStore) -> None:
    with pytest.raises(NotFoundError):
        await _download(transfer, _digest(b"never stored"))
    with pytest.raises(NotFoundError):
        await transfer.stat(_digest(b"never stored"))
    with pytest.raises(InvalidArgumentError):
        await _download(transfer, store.put_bytes(b"abc").digest, 4)
