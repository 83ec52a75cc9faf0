"""The artifact store in an S3-compatible bucket, over a real socket, with signatures that are checked."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import structlog
from s3fs import S3FileSystem

from services.common.artifacts import ArtifactStore
from services.common.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    to_failure,
)
from services.common.logs import configure_logging, get_logger
from tests.support.object_store import BUCKET, Line, ObjectStore, full_object_store, object_store

BLOB = os.urandom(3 * 1024 * 1024 + 17)
pytestmark = pytest.mark.timeout(60)
TOKEN = "session-token-that-nobody-may-see"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture
def url() -> str:
    return f"s3://{BUCKET}/{uuid4().hex}"


@pytest.fixture(autouse=True)
def _reach(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    reach(monkeypatch, server.environment())
    yield
    S3FileSystem.clear_instance_cache()


def bucket() -> Any:
    """Return the driver itself, to see and to change what the store does not know of."""
    return fsspec.filesystem("s3")


def reach(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Have drivers that are made from now on see these variables."""
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3FileSystem, "retries", 2)  # each waits a little longer
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def store(url: str, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url, tmp_path / "cache")


def files(folder: Path) -> list[Path]:
    """Return all files but the empty one whose locks tell which copies are in use."""
    return [path for path in folder.rglob("*") if path.is_file() and (path.name != "in-use" or path.stat().st_size)]


def test_blobs_go_and_come_back(store: ArtifactStore, url: str, tmp_path: Path) -> None:
    source = tmp_path / "model.pt2"
    source.write_bytes(BLOB)
    artifact = store.put_file(source)
    elsewhere = ArtifactStore(url, tmp_path / "another machine")
    assert elsewhere.stat(artifact.digest).size_bytes == len(BLOB)
    assert elsewhere.read_bytes(artifact.digest) == BLOB
    assert elsewhere.local_path(artifact.digest).read_bytes() == BLOB
    with elsewhere.open(artifact.digest, len(BLOB) - 1000) as file:
        assert file.read() == BLOB[-1000:]
    assert elsewhere.put_bytes(BLOB).digest == artifact.digest
    assert elsewhere.put_bytes(b"").size_bytes == 0
    missing = f"sha256:{'0' * 64}"
    for call in (elsewhere.stat, elsewhere.read_bytes, elsewhere.local_path):
        with pytest.raises(NotFoundError):
            call(missing)


def test_references(store: ArtifactStore, url: str, tmp_path: Path) -> None:
    other = ArtifactStore(url, tmp_path / "other")
    assert store.get_ref("jobs/a/checkpoint") is None
    assert store.list_refs() == []
    store.set_ref("jobs/a/checkpoint", b"1")
    store.set_ref("jobs/a", b"2")
    other.set_ref("jobs/a/checkpoint", b"3")
    assert store.get_ref("jobs/a/checkpoint") == b"3"
    assert other.list_refs("jobs/a/") == ["jobs/a/checkpoint"]
    store.delete_ref("jobs/a")
    store.delete_ref("jobs/a")
    assert other.list_refs() == ["jobs/a/checkpoint"]


def test_writers_of_one_blob_on_several_machines(url: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        stores = [ArtifactStore(url, tmp_path / str(number)) for number in range(3)]
        writers = [stack.enter_context(store.writer()) for store in stores]
        for half in (BLOB[:1_000_000], BLOB[1_000_000:]):
            for writer in writers:
                writer.write(half)
        digests = {writer.commit().digest for writer in writers}
    assert len(digests) == 1
    assert ArtifactStore(url, tmp_path / "reader").read_bytes(digests.pop()) == BLOB


def test_damage_in_the_bucket_is_noticed(store: ArtifactStore, url: str, tmp_path: Path) -> None:
    digest = store.put_bytes(BLOB).digest
    key = f"{url.removeprefix('s3://')}/blobs/sha256/{digest[7:9]}/{digest[7:]}"
    bucket().pipe_file(key, BLOB[:-1] + bytes([BLOB[-1] ^ 1]))
    reader = ArtifactStore(url, tmp_path / "reader")
    for call in (reader.read_bytes, reader.verify, reader.local_path, lambda d: reader.open(d, 5)):
        with pytest.raises(DataLossError, match=digest):
            call(digest)
    assert files(tmp_path / "reader") == []


def test_a_damaged_copy_is_fetched_again(store: ArtifactStore) -> None:
    digest = store.put_bytes(BLOB).digest
    path = store.local_path(digest)
    for damaged in (bytes(len(BLOB)), BLOB[:100]):
        path.chmod(0o644)
        path.write_bytes(damaged)
        assert store.local_path(digest).read_bytes() == BLOB
    path.unlink()
    with store.open(digest, 10) as file:
        assert file.read(10) == BLOB[10:20]


def test_a_missing_bucket_is_told(tmp_path: Path) -> None:
    store = ArtifactStore("s3://nobody-made-this-bucket/x", tmp_path)
    digest = f"sha256:{'0' * 64}"
    for call in (
        lambda: store.put_bytes(b"x"),
        lambda: store.stat(digest),
        lambda: store.exists(digest),
        lambda: store.set_ref("a", b"x"),
        lambda: store.get_ref("a"),
        lambda: store.delete_ref("a"),
        lambda: store.list_refs(),
    ):
        with pytest.raises(FailedPreconditionError, match="bucket does not exist") as caught:
            call()
        assert caught.value.reason == "STORE_MISSING"
    assert files(tmp_path) == []


@pytest.fixture
def _everything_logged(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging("console", "DEBUG")
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


@pytest.mark.usefixtures("_everything_logged")
@pytest.mark.parametrize("wrong", ["secret", "key", "token", "none"])
def test_refused_credentials_are_told_and_not_shown(
    wrong: str,
    server: ObjectStore,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = "s3cret-that-nobody-may-see"
    reach(monkeypatch, {"AWS_SECRET_ACCESS_KEY": secret})
    if wrong == "token":
        monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    elif wrong == "key":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    elif wrong == "none":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
    store = ArtifactStore(url, tmp_path)
    shown = []
    for call in (
        lambda: store.put_bytes(b"x"),
        lambda: store.stat(f"sha256:{'0' * 64}"),
        lambda: store.get_ref("a"),
        lambda: store.list_refs(),
    ):
        with pytest.raises(FailedPreconditionError, match="refuses this server's credentials") as caught:
            call()
        assert caught.value.reason == "STORE_DENIED"
        get_logger("test").error("failed", exc_info=caught.value)
        shown.append(str(to_failure(caught.value)))
    logged = capsys.readouterr().err
    assert "failed" in logged
    assert "Traceback" in logged
    for hidden in (secret, TOKEN, server.secret):
        assert hidden not in logged
        assert all(hidden not in text for text in shown)
    assert files(tmp_path) == []


@pytest.mark.usefixtures("_everything_logged")
def test_what_works_shows_no_credentials_either(
    server: ObjectStore, store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.read_bytes(store.put_bytes(BLOB).digest)
    assert server.secret not in capsys.readouterr().err


@pytest.mark.parametrize("url", ["s3://key:s3cret@bucket/x", "s3://bucket/x?secret=s3cret", "s3://bucket/x#s3cret"])
def test_credentials_in_the_url_are_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="environment") as caught:
        ArtifactStore(url, tmp_path)
    assert "s3cret" not in caught.value.message


@pytest.mark.parametrize("direction", ["upload", "download", "copy"])
def test_a_server_that_goes_away_in_the_middle(
    direction: str, server: ObjectStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = ArtifactStore(url, tmp_path / "first").put_bytes(BLOB).digest
    other = os.urandom(len(BLOB))
    line = Line(server.port, len(BLOB) // 2)
    reach(monkeypatch, server.environment(line.port))
    store = ArtifactStore(url, tmp_path / "second")
    calls: dict[str, Callable[[], object]] = {
        "upload": lambda: store.put_bytes(other),
        "download": lambda: store.read_bytes(digest),
        "copy": lambda: store.local_path(digest),
    }
    with pytest.raises(UnavailableError, match="artifact store failed") as caught:
        calls[direction]()
    assert str(line.port) not in caught.value.message
    assert line.is_dead
    assert files(tmp_path / "second") == []
    reach(monkeypatch, server.environment())
    store = ArtifactStore(url, tmp_path / "second")
    assert len(bucket().find(f"{url.removeprefix('s3://')}/blobs")) == 1
    assert store.read_bytes(digest) == BLOB


def test_a_server_that_is_not_there(
    server: ObjectStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(server.port, 0)
    line.close()
    reach(monkeypatch, server.environment(line.port))
    store = ArtifactStore(url, tmp_path)
    with pytest.raises(UnavailableError, match="artifact store failed"):
        store.put_bytes(b"x")
    assert files(tmp_path) == []


def test_a_full_spool_leaves_nothing(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResourceExhaustedError):
        store.put_bytes(BLOB)
    assert files(tmp_path) == []
    assert store.list_refs() == []


def test_a_full_bucket_is_no_passing_failure(
    server: ObjectStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full_object_store() as port:
        reach(monkeypatch, server.environment(port))
        store = ArtifactStore(url, tmp_path)
        for call in (lambda: store.put_bytes(b"x"), lambda: store.set_ref("a", b"x")):
            with pytest.raises(ResourceExhaustedError) as caught:
                call()
            assert caught.value.reason == "DISK_FULL"
    assert files(tmp_path) == []
