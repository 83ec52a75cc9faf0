"""Copies of a bucket's blobs take no more than they may, and none goes that somebody uses."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from services.common.artifacts import ArtifactStore
from services.common.metrics import CACHE_REMOVED_BYTES
from tests.support.object_store import BUCKET, object_store

SIZE = 100_000
pytestmark = pytest.mark.timeout(60)
# Uses the first blob to its end, and meanwhile reads all of them as further processes would.
READER = """
import hashlib, sys
from pathlib import Path
from services.common.artifacts import ArtifactStore

url, cache, limit, *digests = sys.argv[1:]
new = lambda: ArtifactStore(url, Path(cache), cache_bytes=int(limit))
store = new()
used = store.local_path(digests[0])
for digest in digests[1:]:
    assert "sha256:" + hashlib.sha256(new().local_path(digest).read_bytes()).hexdigest() == digest
print(used.name, flush=True)
sys.stdin.read()
assert "sha256:" + hashlib.sha256(used.read_bytes()).hexdigest() == digests[0]
"""


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


@pytest.fixture
def digests(url: str, tmp_path: Path) -> list[str]:
    return stored(url, tmp_path)


def stored(url: str, folder: Path) -> list[str]:
    store = ArtifactStore(url, folder / "first")
    return [store.put_bytes(os.urandom(SIZE)).digest for _ in range(4)]


def copies(cache: Path) -> dict[str, Path]:
    """Return what is in the folder, by digest."""
    return {f"sha256:{path.name}": path for path in (cache / "blobs").rglob("*") if path.is_file()}


def read(store: ArtifactStore, digest: str) -> None:
    """Use a local copy for a moment, as a server does."""
    with store.open(digest, 1) as file:
        assert len(file.read()) == SIZE - 1


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_copies_used_longest_ago_make_room(url: str, digests: list[str], tmp_path: Path) -> None:
    store = ArtifactStore(url, tmp_path, cache_bytes=3 * SIZE + 1)
    removed = CACHE_REMOVED_BYTES._value.get()
    for number, digest in enumerate(digests[:3]):
        read(store, digest)
        age(copies(tmp_path)[digest], 1000 - number)
    read(store, digests[0])  # the oldest until now
    read(store, digests[3])
    assert set(copies(tmp_path)) == {digests[0], digests[2], digests[3]}
    assert CACHE_REMOVED_BYTES._value.get() - removed == SIZE
    own = store.put_bytes(os.urandom(2 * SIZE)).digest
    assert set(copies(tmp_path)) >= {own}
    assert sum(path.stat().st_size for path in copies(tmp_path).values()) <= 3 * SIZE
    read(store, digests[1])


def test_a_copy_in_use_stays(url: str, digests: list[str], tmp_path: Path) -> None:
    user = ArtifactStore(url, tmp_path, cache_bytes=1)
    used = [user.local_path(digest) for digest in digests[:2]]
    for path in used:
        age(path, 1000)
    other = ArtifactStore(url, tmp_path, cache_bytes=1)
    with other.open(digests[3], 1) as file:
        for digest in digests:
            read(other, digest)
        assert set(copies(tmp_path)) == {*digests[:2], digests[3]}
        other.put_bytes(b"x")
        assert set(copies(tmp_path)) == set(digests[:2])
        assert len(file.read()) == SIZE - 1, "it was open"
    assert [path.stat().st_size for path in used] == [SIZE] * 2
    del user
    other.put_bytes(b"yy")
    assert copies(tmp_path) == {}, "nobody uses them any more, and two bytes are one too many"


def test_what_lies_beside_the_copies_stays(url: str, tmp_path: Path) -> None:
    store = ArtifactStore(url, tmp_path, cache_bytes=0)
    digest = store.put_bytes(bytes(SIZE)).digest
    download = tmp_path / "blobs" / "sha256" / digest[7:9] / f".{digest[7:]}.{digest[-12:]}.part"
    download.write_bytes(bytes(SIZE))
    store.put_bytes(b"x")
    assert set(copies(tmp_path).values()) == {download}
    kept = ArtifactStore((tmp_path / "own").as_uri(), cache_bytes=0)
    assert kept.local_path(kept.put_bytes(b"x").digest).is_file(), "a store itself is no cache"


@pytest.fixture
def _bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with object_store() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield


@pytest.mark.usefixtures("_bucket")
def test_processes_share_a_folder(tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/{uuid4().hex}"
    digests = stored(url, tmp_path)
    cache = tmp_path / "shared"
    command = [sys.executable, "-c", READER, url, str(cache), str(SIZE)]
    readers = [
        subprocess.Popen([*command, *order], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for order in (digests, digests[::-1])
    ]
    try:
        used = []
        for reader in readers:
            assert reader.stdout is not None
            used.append(reader.stdout.readline().strip())
        assert used == [digests[0][7:], digests[-1][7:]], "one of them failed; its message is above"
        store = ArtifactStore(url, cache, cache_bytes=SIZE)
        read(store, digests[2])
        store.put_bytes(b"x")
        assert set(copies(cache)) == {digests[0], digests[-1]}
    finally:
        for reader in readers:
            reader.communicate()
    assert [reader.returncode for reader in readers] == [0, 0]
    store.put_bytes(b"y")
    assert sum(path.stat().st_size for path in copies(cache).values()) <= SIZE
