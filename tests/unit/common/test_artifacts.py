"""The store keeps what it was given, whole and under its digest, or says what is wrong."""

import errno
import hashlib
import os
import threading
import time
from pathlib import Path
from uuid import uuid4

import pytest

from services.common.artifacts import ArtifactStore
from services.common.artifacts.local import LocalStaged
from services.common.errors import (
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)

BLOB = os.urandom(3 * 1024 * 1024 + 17)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "file":
        return ArtifactStore((tmp_path / "a store").as_uri())
    return ArtifactStore(f"memory://{uuid4().hex}/prefix", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "local"


@pytest.fixture
def local(folder: Path) -> ArtifactStore:
    return ArtifactStore(folder.as_uri())


def files(folder: Path) -> list[Path]:
    """Return all files but the empty one whose locks tell which copies are in use."""
    return [path for path in folder.rglob("*") if path.is_file() and (path.name != "in-use" or path.stat().st_size)]


def test_bytes_round_trip(store: ArtifactStore) -> None:
    artifact = store.put_bytes(BLOB, "weights.bin", "application/x-test")
    assert (artifact.digest, artifact.size_bytes) == (digest_of(BLOB), len(BLOB))
    assert (artifact.name, artifact.media_type) == ("weights.bin", "application/x-test")
    assert store.read_bytes(artifact.digest) == BLOB
    assert store.stat(artifact.digest).size_bytes == len(BLOB)
    assert store.exists(artifact.digest)
    store.verify(artifact.digest)
    assert store.local_path(artifact.digest).read_bytes() == BLOB
    assert store.put_bytes(BLOB).digest == artifact.digest


def test_empty_blob(store: ArtifactStore) -> None:
    artifact = store.put_bytes(b"")
    assert store.read_bytes(artifact.digest) == b""
    assert store.local_path(artifact.digest).read_bytes() == b""


def test_file_round_trip(store: ArtifactStore, tmp_path: Path) -> None:
    source = tmp_path / "model.pt2"
    source.write_bytes(BLOB)
    artifact = store.put_file(source)
    assert artifact.name == "model.pt2"
    assert store.read_bytes(artifact.digest) == BLOB
    assert source.exists()


@pytest.mark.parametrize("offset", [0, 1, 1024 * 1024, len(BLOB) - 1, len(BLOB)])
def test_open_from_offset(store: ArtifactStore, offset: int) -> None:
    digest = store.put_bytes(BLOB).digest
    with store.open(digest, offset) as file:
        assert file.read() == BLOB[offset:]
        file.seek(5)
        assert file.read(3) == BLOB[5:8]


def test_offset_outside(store: ArtifactStore) -> None:
    digest = store.put_bytes(b"abc").digest
    for offset in (-1, 4):
        with pytest.raises(InvalidArgumentError) as caught:
            store.open(digest, offset)
        assert caught.value.field == "offset"


def test_missing_blob(store: ArtifactStore) -> None:
    missing = digest_of(b"never stored")
    assert not store.exists(missing)
    for method in (store.stat, store.open, store.read_bytes, store.verify, store.local_path):
        with pytest.raises(NotFoundError, match=missing):
            method(missing)


@pytest.mark.parametrize("digest", ["", "sha256:abc", "sha256:" + "A" * 64, "md5:" + "0" * 64, "../../etc/passwd"])
def test_malformed_digest(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(InvalidArgumentError, match="digest"):
        store.read_bytes(digest)


def test_writer_without_commit_leaves_nothing(local: ArtifactStore, folder: Path) -> None:
    with local.writer() as writer:
        writer.write(b"half")
    with pytest.raises(TypeError), local.writer() as writer:
        writer.write("half")  # type: ignore[arg-type]
    assert files(folder) == []


def test_nothing_is_visible_before_commit(store: ArtifactStore) -> None:
    with store.writer("x") as writer:
        writer.write(b"ab")
        writer.write(b"cd")
        assert not store.exists(digest_of(b"abcd"))
        artifact = writer.commit()
    assert artifact.digest == digest_of(b"abcd")
    assert store.read_bytes(artifact.digest) == b"abcd"


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend"])
def test_damage_is_noticed_and_repaired_by_storing_again(local: ArtifactStore, damage: str) -> None:
    digest = local.put_bytes(BLOB).digest
    path = local.local_path(digest)
    content = bytearray(BLOB)
    if damage == "flip":
        content[len(BLOB) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes({"truncate": BLOB[:-1], "extend": BLOB + b"x"}.get(damage, bytes(content)))
    for method in (local.read_bytes, local.verify, ArtifactStore(local.url).local_path):
        with pytest.raises(DataLossError, match=digest):
            method(digest)
    local.put_bytes(BLOB)
    assert local.read_bytes(digest) == BLOB


def test_damaged_bytes_are_not_handed_out_to_the_end(local: ArtifactStore) -> None:
    digest = local.put_bytes(BLOB).digest
    path = local.local_path(digest)
    path.chmod(0o644)
    path.write_bytes(b"\0" * len(BLOB))
    received: list[bytes] = []
    with local.open(digest) as file, pytest.raises(DataLossError):
        received.extend(iter(lambda: file.read(1000), b""))
    assert sum(map(len, received)) < len(BLOB)


def test_damaged_remote_blob_is_not_cached(tmp_path: Path) -> None:
    import fsspec

    name = uuid4().hex
    digest = ArtifactStore(f"memory://{name}", tmp_path / "writer").put_bytes(BLOB).digest
    remote = fsspec.filesystem("memory")
    key = next(path for path in remote.find(name) if path.endswith(digest[-64:]))
    remote.pipe_file(key, BLOB[:-1] + bytes([BLOB[-1] ^ 1]))
    reader = ArtifactStore(f"memory://{name}", tmp_path / "reader")
    with pytest.raises(DataLossError):
        reader.local_path(digest)
    assert files(tmp_path / "reader") == []


def test_truncated_cached_copy_is_fetched_again(tmp_path: Path) -> None:
    store = ArtifactStore(f"memory://{uuid4().hex}", tmp_path)
    digest = store.put_bytes(BLOB).digest
    path = store.local_path(digest)
    path.chmod(0o644)
    path.write_bytes(BLOB[:100])
    assert store.local_path(digest).read_bytes() == BLOB


def test_full_disk(local: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: LocalStaged) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResourceExhaustedError) as caught:
        local.put_bytes(BLOB)
    assert caught.value.reason == "DISK_FULL"
    assert files(folder) == []


def test_really_full_disk(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    staged = ArtifactStore(tmp_path.as_uri()).writer()
    staged._staged._file = open("/dev/full", "wb")  # type: ignore[attr-defined]  # noqa: SIM115
    with pytest.raises(ResourceExhaustedError), staged:
        staged.write(BLOB)


def test_bytes_reach_the_disk_before_their_name_and_new_folders_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = ArtifactStore(folder.as_uri())
    steps: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        steps.append("rename")
        real_replace(source, target)

    monkeypatch.setattr("os.fsync", sync)
    monkeypatch.setattr("os.replace", replace)
    digest = local.put_bytes(BLOB).digest
    assert steps[0].startswith(f"{folder}/tmp/")
    assert steps[1] == "rename"
    assert steps[2:] == [
        f"{folder}/blobs/sha256/{digest[7:9]}",
        f"{folder}/blobs/sha256",
        f"{folder}/blobs",
        f"{folder}",
    ]


def test_a_removed_folder_for_uploads_is_made_again(local: ArtifactStore, folder: Path) -> None:
    (folder / "tmp").rmdir()
    assert local.read_bytes(local.put_bytes(b"abc").digest) == b"abc"


def test_a_file_that_changed_after_it_was_verified_is_verified_again(local: ArtifactStore) -> None:
    digest = local.put_bytes(BLOB).digest
    path = local.local_path(digest)
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(bytes(len(BLOB)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as who wants to hide it would
    with pytest.raises(DataLossError):
        local.local_path(digest)
    with pytest.raises(DataLossError):
        local.open(digest, 100)


def test_references_that_cannot_be_listed_are_not_taken_for_none(
    local: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.set_ref("jobs/a", b"1")

    def refuse(_path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UnavailableError, match="Permission denied"):
        local.list_refs()


def test_unreadable_store_is_unavailable(local: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = local.put_bytes(b"abc").digest

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/secret/path")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UnavailableError, match="Permission denied") as caught:
        local.read_bytes(digest)
    assert "/secret" not in caught.value.message


@pytest.mark.parametrize("url", ["file://host/folder", "file:relative", "/plain/path", ""])
def test_wrong_urls(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match="URL"):
        ArtifactStore(url)


def test_unknown_scheme(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="begins with file://"):
        ArtifactStore("nosuch://bucket", tmp_path)


def test_refs(store: ArtifactStore) -> None:
    assert store.get_ref("jobs/a/checkpoint") is None
    store.set_ref("jobs/a", b"1")
    store.set_ref("jobs/a/checkpoint", b"2")
    store.set_ref("jobs/ab/checkpoint", b"3")
    store.set_ref("jobs/a", b"4")
    assert store.get_ref("jobs/a") == b"4"
    assert store.list_refs() == ["jobs/a", "jobs/a/checkpoint", "jobs/ab/checkpoint"]
    assert store.list_refs("jobs/a/") == ["jobs/a/checkpoint"]
    assert store.list_refs("nothing/") == []
    store.delete_ref("jobs/a")
    store.delete_ref("jobs/a")
    assert store.get_ref("jobs/a") is None
    assert store.get_ref("jobs/a/checkpoint") == b"2"


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.b", "a@ref", "a b", "a\n"])
def test_malformed_ref_names(store: ArtifactStore, name: str) -> None:
    for call in (store.get_ref, store.delete_ref, lambda n: store.set_ref(n, b"")):
        with pytest.raises(InvalidArgumentError):
            call(name)


def test_ref_is_never_seen_half_written(local: ArtifactStore) -> None:
    values = [bytes([i]) * 200_000 for i in range(2)]
    local.set_ref("r", values[0])
    done = threading.Event()

    def write() -> None:
        for i in range(30):
            local.set_ref("r", values[i % 2])
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        assert local.get_ref("r") in values
    thread.join()


def test_concurrent_writers_of_one_blob(store: ArtifactStore) -> None:
    threads = [threading.Thread(target=store.put_bytes, args=(BLOB,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read_bytes(digest_of(BLOB)) == BLOB


def test_abandoned_uploads_are_removed(local: ArtifactStore, folder: Path) -> None:
    old, young = folder / "tmp" / "old", folder / "tmp" / "young"
    for path in (old, young):
        path.write_bytes(b"x")
    day_before_yesterday = time.time() - 2 * 24 * 3600
    os.utime(old, (day_before_yesterday, day_before_yesterday))
    with local.writer() as writer:
        writer.write(b"x")
        (written,) = (path for path in (folder / "tmp").iterdir() if path not in (old, young))
        os.utime(written, (day_before_yesterday, day_before_yesterday))
        ArtifactStore(local.url)
        assert not old.exists()
        assert young.exists()
        assert written.exists()
        writer.commit()


def test_blobs_are_read_only_on_disk(local: ArtifactStore) -> None:
    path = local.local_path(local.put_bytes(b"abc").digest)
    assert path.stat().st_mode & 0o222 == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "https://example.org/a",
        "ftp://h/a",
        "sftp://h/a",
        "simplecache::s3://b/a",
        "s3://b/a::http://h/x",
        "local:///etc",
        "reference://a",
    ],
)
def test_urls_that_would_fetch_from_elsewhere(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match="begins with file://"):
        ArtifactStore(url)
