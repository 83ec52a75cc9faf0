"""The client against a real gRPC server that breaks connections on demand."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import granq
from granq.v1 import coordinator_pb2
from tests.support.fake_coordinator import CHUNK, FakeCoordinator, digest_of, serve

CONTENT = bytes(range(256)) * (CHUNK // 64)  # four chunks
STATES = (coordinator_pb2.PIPELINE_STATE_SUCCEEDED, coordinator_pb2.PIPELINE_STATE_FAILED)


@pytest.fixture
def fake() -> FakeCoordinator:
    return FakeCoordinator()


@pytest.fixture
def client(fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> Iterator[granq.Client]:
    # Waiting is what is not tested here; the calls around it are.
    monkeypatch.setattr("granq.channel.Backoff.next", lambda self: 0.001)
    with serve(fake) as address, granq.Client(address, timeout=10.0) as client:
        yield client


def sequences(events: Iterator[coordinator_pb2.WatchPipelineResponse]) -> list[int]:
    return [event.sequence for event in events]


def spec(bits: int = 4) -> coordinator_pb2.PipelineSpec:
    artifact = coordinator_pb2.PipelineSpec().model.artifact
    artifact.digest = digest_of(b"model")
    return granq.pipeline_spec(granq.model_source(artifact), weight_bits=bits)


def test_watch_goes_on_after_lost_connections_without_gap_or_repeat(
    fake: FakeCoordinator, client: granq.Client
) -> None:
    fake.add("p", events=9)
    fake.break_after = [0, 3, 3, None, 7]
    assert sequences(client.watch("p")) == list(range(1, 10))
    assert fake.calls.count("WatchPipeline") == 6


def test_watch_begins_after_a_given_event(fake: FakeCoordinator, client: granq.Client) -> None:
    fake.add("p", events=5)
    assert sequences(client.watch("p", after_sequence=3)) == [4, 5]
    assert sequences(client.watch("p", after_sequence=5)) == []


def test_watch_passes_a_final_state_that_a_retry_left_behind(fake: FakeCoordinator, client: granq.Client) -> None:
    fake.add("p", events=5)
    fake.events["p"][1].state = coordinator_pb2.PIPELINE_STATE_FAILED
    assert sequences(client.watch("p")) == [1, 2, 3, 4, 5]


def test_watch_drops_repeated_events_and_reports_missing_ones(fake: FakeCoordinator, client: granq.Client) -> None:
    fake.add("p", events=4)
    fake.events["p"].insert(2, fake.events["p"][1])
    assert sequences(client.watch("p")) == [1, 2, 3, 4]
    del fake.events["p"][0]
    with pytest.raises(granq.GranqClientError) as caught:
        sequences(client.watch("p"))
    assert caught.value.code == grpc.StatusCode.DATA_LOSS
    assert caught.value.reason == "EVENT_GAP"


def test_watch_survives_a_restart_of_the_server(fake: FakeCoordinator) -> None:
    fake.add("p", events=6)
    seen = []
    with serve(fake) as address:
        client = granq.Client(address, timeout=10.0)
        events = client.watch("p")
        fake.break_after = [2]
        seen += [next(events).sequence, next(events).sequence]
    with serve(fake, address):
        seen += sequences(events)
    client.close()
    assert seen == [1, 2, 3, 4, 5, 6]


def test_watch_gives_up_when_no_server_comes_back(fake: FakeCoordinator) -> None:
    with serve(fake) as address:
        pass
    with granq.Client(address, timeout=5.0, patience=0.0) as client:
        with pytest.raises(granq.GranqClientError) as caught:
            sequences(client.watch("p"))
        assert caught.value.code == grpc.StatusCode.UNAVAILABLE


def test_wait_stops_at_its_timeout(fake: FakeCoordinator, client: granq.Client) -> None:
    fake.add("p", events=1, state=coordinator_pb2.PIPELINE_STATE_RUNNING)
    with pytest.raises(granq.GranqClientError) as caught:
        client.wait("p", timeout=0.3)
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED


def test_wait_returns_the_ended_pipeline(fake: FakeCoordinator, client: granq.Client) -> None:
    fake.add("p", events=3)
    assert client.wait("p").state == coordinator_pb2.PIPELINE_STATE_SUCCEEDED


def test_submit_is_repeated_when_the_server_is_away_for_a_moment(fake: FakeCoordinator, client: granq.Client) -> None:
    fake.unavailable = 2
    first = client.submit(spec(), request_id="r1")
    assert fake.calls.count("SubmitPipeline") == 3
    assert client.submit(spec(), request_id="r1").pipeline_id == first.pipeline_id
    assert client.submit(spec()).pipeline_id != first.pipeline_id


def test_retry_is_not_repeated(fake: FakeCoordinator, client: granq.Client) -> None:
    fake.add("p")
    fake.unavailable = 1
    with pytest.raises(granq.GranqClientError) as caught:
        client.retry("p")
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE
    assert fake.calls == ["RetryPipeline"]


def test_errors_carry_reason_and_field(client: granq.Client) -> None:
    with pytest.raises(granq.GranqClientError) as caught:
        client.submit(spec(bits=9))
    error = caught.value
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "spec.quantization.weight_bits")
    assert error.reason == "INVALID_ARGUMENT"
    assert error.message == "must be 2 to 8"
    with pytest.raises(granq.GranqClientError) as caught:
        client.get("nothing")
    assert caught.value.reason == "PIPELINE_NOT_FOUND"


def test_list_goes_through_all_pages(fake: FakeCoordinator, client: granq.Client) -> None:
    for number in range(5):
        fake.add(f"p{number}", state=STATES[number % 2])
    assert [p.pipeline_id for p in client.list()] == ["p4", "p3", "p2", "p1", "p0"]
    failed = client.list(states=["PIPELINE_STATE_FAILED"], page_size=1)
    assert [p.pipeline_id for p in failed] == ["p3", "p1"]


def test_cancel_and_delete(fake: FakeCoordinator, client: granq.Client) -> None:
    fake.add("p")
    assert client.cancel("p").state == coordinator_pb2.PIPELINE_STATE_CANCELLED
    assert client.retry("p").state == coordinator_pb2.PIPELINE_STATE_QUEUED
    client.delete("p")
    assert not fake.pipelines


def test_upload_sends_content_once_and_reports_progress(
    fake: FakeCoordinator, client: granq.Client, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(CONTENT)
    progress: list[tuple[int, int]] = []
    artifact = client.upload(path, progress=lambda done, total: progress.append((done, total)))
    assert artifact.name == "model.pt2"
    assert fake.blobs[artifact.digest] == CONTENT
    assert progress[-1] == (len(CONTENT), len(CONTENT))
    assert client.upload(CONTENT, name="again").digest == artifact.digest
    assert fake.calls.count("UploadArtifact") == 1


def test_upload_begins_again_after_a_lost_connection(
    fake: FakeCoordinator, client: granq.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FakeCoordinator._enter
    broken = ["UploadArtifact"]

    def enter(self: FakeCoordinator, name: str, context: grpc.ServicerContext) -> None:
        if name in broken:
            broken.remove(name)
            self.unavailable = 1
        original(self, name, context)

    monkeypatch.setattr(FakeCoordinator, "_enter", enter)
    assert fake.blobs[client.upload(CONTENT).digest] == CONTENT
    assert fake.calls.count("UploadArtifact") == 2


def test_an_empty_file_can_be_stored_and_fetched(fake: FakeCoordinator, client: granq.Client, tmp_path: Path) -> None:
    artifact = client.upload(b"", name="empty")
    assert client.download(artifact, tmp_path).read_bytes() == b""
    assert (tmp_path / "empty").is_file()


def test_download_goes_on_where_the_connection_broke(
    fake: FakeCoordinator, client: granq.Client, tmp_path: Path
) -> None:
    fake.blobs[digest_of(CONTENT)] = CONTENT
    fake.break_downloads = [1, 2]
    target = client.download(digest_of(CONTENT), tmp_path / "new" / "out.bin")
    assert target.read_bytes() == CONTENT
    assert fake.offsets == [0, CHUNK, 3 * CHUNK]
    assert [path.name for path in target.parent.iterdir()] == ["out.bin"]


def test_a_later_download_resumes_an_abandoned_one(fake: FakeCoordinator, client: granq.Client, tmp_path: Path) -> None:
    digest = digest_of(CONTENT)
    fake.blobs[digest] = CONTENT
    fake.break_downloads = [1, 0, 0, 0, 0]
    with pytest.raises(granq.GranqClientError) as caught:
        client.download(digest, tmp_path / "out.bin")
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE
    assert not (tmp_path / "out.bin").exists()
    fake.offsets.clear()
    client.download(digest, tmp_path / "out.bin")
    assert fake.offsets == [CHUNK]


def test_a_damaged_earlier_part_is_replaced(fake: FakeCoordinator, client: granq.Client, tmp_path: Path) -> None:
    digest = digest_of(CONTENT)
    fake.blobs[digest] = CONTENT
    (tmp_path / f".out.bin.{digest[-12:]}.part").write_bytes(b"x" * CHUNK)
    assert client.download(digest, tmp_path / "out.bin").read_bytes() == CONTENT
    assert fake.offsets == [CHUNK, 0]


def test_wrong_content_is_never_kept(fake: FakeCoordinator, client: granq.Client, tmp_path: Path) -> None:
    digest = digest_of(CONTENT)
    fake.blobs[digest] = CONTENT
    fake.corrupt.add(digest)
    with pytest.raises(granq.GranqClientError) as caught:
        client.download(digest, tmp_path / "out.bin")
    assert caught.value.code == grpc.StatusCode.DATA_LOSS
    assert caught.value.reason == "DIGEST_MISMATCH"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_already_is_not_fetched(
    fake: FakeCoordinator, client: granq.Client, tmp_path: Path
) -> None:
    digest = digest_of(CONTENT)
    fake.blobs[digest] = CONTENT
    (tmp_path / "out.bin").write_bytes(CONTENT)
    client.download(digest, tmp_path / "out.bin")
    assert "DownloadArtifact" not in fake.calls


def test_every_call_but_watch_has_a_deadline(fake: FakeCoordinator, client: granq.Client, tmp_path: Path) -> None:
    pipeline = client.submit(spec())
    for call in (client.get, client.wait, client.cancel, client.retry, client.delete):
        call(pipeline.pipeline_id)
    list(client.list())
    client.download(client.upload(CONTENT, name="file"), tmp_path)
    assert len(fake.deadlines) == 9
    for name, seconds in fake.deadlines.items():
        assert seconds is not None, name
        assert 0 < seconds < 60.0, name  # without a deadline it would be years
