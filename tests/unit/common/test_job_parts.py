"""The parts of the job machinery by themselves: reports, frames, events, records."""

import asyncio
import io
import threading
from pathlib import Path

import pytest

from granq.v1 import artifacts_pb2, common_pb2, generator_pb2, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import AlreadyExistsError, CancelledError, DataLossError, NotFoundError, UnavailableError
from services.common.jobs import JobContext, wire
from services.common.jobs.context import checkpoint_ref
from services.common.jobs.records import JobRecords, request_digest
from services.common.jobs.run import MAX_EVENTS, Run
from services.common.jobs.wire import Frame
from services.common.logs import get_logger
from services.common.settings import ServerSettings

CLOSED = UnavailableError("the server ends")


class Recorder:
    """A context whose reports are kept."""

    def __init__(self, tmp_path: Path) -> None:
        self.sent: list[jobs_pb2.Progress] = []
        self.cancelled = threading.Event()
        self.context = JobContext(
            "job",
            "",
            ArtifactStore(tmp_path.as_uri()),
            ServerSettings(),
            get_logger(),
            self.sent.append,
            self.cancelled,
        )

    def steps(self) -> list[tuple[str, int]]:
        return [(progress.phase, progress.step) for progress in self.sent]


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("services.common.jobs.context.time.monotonic", lambda: now[0])
    return now


def test_reports_are_throttled_but_none_that_matters_is_lost(recorder: Recorder, clock: list[float]) -> None:
    for step in range(1, 50):
        recorder.context.report("train", step, 100, loss=step)
    assert recorder.steps() == [("train", 1)]
    clock[0] += 0.2
    recorder.context.report("train", 50, 100)
    recorder.context.report("train", 51, 100)
    recorder.context.report("train", 100, 100, loss=0.5)
    assert recorder.steps()[1:] == [("train", 50), ("train", 100)]
    assert dict(recorder.sent[-1].metrics) == {"loss": 0.5}


def test_new_phase_is_told_after_the_last_report_of_the_old_one(recorder: Recorder, clock: list[float]) -> None:
    for step in (1, 2, 3):
        recorder.context.report("warm-up", step)
    recorder.context.report("train")
    recorder.context.report("export")
    assert recorder.steps() == [("warm-up", 1), ("warm-up", 3), ("train", 0), ("export", 0)]
    recorder.context.report("export", 1)
    recorder.context.flush()
    recorder.context.flush()
    assert recorder.steps()[-1] == ("export", 1)
    assert len(recorder.sent) == 5


def test_figures_that_are_not_told_are_not_converted(recorder: Recorder, clock: list[float]) -> None:
    class Costly:
        conversions = 0

        def __float__(self) -> float:
            self.conversions += 1
            return 1.0

    costly = Costly()
    for step in range(100):
        recorder.context.report("train", step, loss=costly)
    assert costly.conversions == 1


def test_cancellation(recorder: Recorder) -> None:
    recorder.context.check_cancelled()
    recorder.cancelled.set()
    with pytest.raises(CancelledError):
        recorder.context.check_cancelled()


def test_what_the_store_does_not_give_is_told_by_field(recorder: Recorder, tmp_path: Path) -> None:
    artifact = recorder.context.store.put_bytes(b"model")
    (blob,) = tmp_path.rglob(artifact.digest.removeprefix("sha256:"))
    blob.chmod(0o644)
    blob.write_bytes(b"other")
    with pytest.raises(DataLossError) as damaged:
        recorder.context.reading("model.artifact", artifact)
    blob.unlink()
    with pytest.raises(NotFoundError) as missing:
        recorder.context.reading("model.artifact", artifact)
    assert (damaged.value.reason, damaged.value.field) == ("BLOB_DAMAGED", "model.artifact")
    assert (missing.value.reason, missing.value.field) == ("ARTIFACT_NOT_FOUND", "model.artifact")


def test_checkpoint(recorder: Recorder) -> None:
    assert recorder.context.load_checkpoint() is None
    for content in (b"one", b"two"):
        artifact = recorder.context.store.put_bytes(content, "state")
        recorder.context.save_checkpoint(artifact)
        assert recorder.context.load_checkpoint() == artifact
    assert isinstance(recorder.context.load_checkpoint(), artifacts_pb2.Artifact)


@pytest.mark.parametrize("wrong", ["form", "unversioned", "file gone", "file damaged", "file that it needs gone"])
def test_a_checkpoint_that_cannot_be_used_is_left_out_and_told(recorder: Recorder, wrong: str, tmp_path: Path) -> None:
    context, needed = recorder.context, recorder.context.store.put_bytes(b"generator")
    artifact = context.store.put_bytes(b"state", "state")
    context.save_checkpoint(artifact, "trainer/1", (needed.digest,))
    assert context.load_checkpoint("trainer/1") == artifact
    assert not recorder.sent
    context.store._verified.clear()
    form = "trainer/1"
    blobs = {each.digest: next(tmp_path.rglob(each.digest.removeprefix("sha256:"))) for each in (artifact, needed)}
    match wrong:
        case "form":
            form = "trainer/2"
        case "unversioned":
            context.store.set_ref(checkpoint_ref("job"), artifact.SerializeToString())
        case "file gone":
            blobs[artifact.digest].unlink()
        case "file damaged":
            blobs[artifact.digest].chmod(0o644)
            blobs[artifact.digest].write_bytes(b"stale")
        case "file that it needs gone":
            blobs[needed.digest].unlink()
    assert context.load_checkpoint(form) is None
    (told,) = recorder.sent
    assert told.phase.startswith("beginning anew")


def test_a_checkpoint_whose_store_is_away_is_not_left_out(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(name: str) -> bytes:
        raise UnavailableError("the artifact store failed")

    monkeypatch.setattr(recorder.context.store, "get_ref", away)
    with pytest.raises(UnavailableError):
        recorder.context.load_checkpoint()


@pytest.mark.parametrize("payload", [b"", b"x", bytes(100_000)])
async def test_frames(payload: bytes) -> None:
    data = wire.encode(Frame.PROGRESS, payload) + wire.encode(Frame.CANCEL)
    stream, reader = io.BytesIO(data), asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    for expected in ((Frame.PROGRESS, payload), (Frame.CANCEL, b""), None):
        assert wire.read(stream) == expected
        assert await wire.read_async(reader) == expected


@pytest.mark.parametrize("length", [0, 1, 4, 5, 7])
async def test_frame_that_breaks_off(length: int) -> None:
    data = wire.encode(Frame.RESULT, b"abc")[:length]
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    assert wire.read(io.BytesIO(data)) is None
    assert await wire.read_async(reader) is None


async def test_ring_keeps_the_newest_events_without_gaps() -> None:
    run = Run("kind", jobs_pb2.JobKey(job_id="a"), "digest")
    run.begin()
    for step in range(2 * MAX_EVENTS):
        run.progress(jobs_pb2.Progress(step=step))
    run.fail(CancelledError("stopped"))
    last = 2 * MAX_EVENTS + 3
    assert [e.sequence async for e in run.watch(0, "", CLOSED)] == list(range(last - MAX_EVENTS + 1, last + 1))
    assert [e.sequence async for e in run.watch(last - 2, run.run_id, CLOSED)] == [last - 1, last]
    assert [e async for e in run.watch(last + 5, run.run_id, CLOSED)] == []


async def test_watcher_gets_what_comes_while_it_is_busy() -> None:
    run = Run("kind", jobs_pb2.JobKey(job_id="a"), "digest")
    seen = []
    async for event in run.watch(0, "", CLOSED):
        seen.append(event.sequence)
        if event.sequence == 1:
            run.begin()
        elif event.sequence == 2:
            run.progress(jobs_pb2.Progress(step=1))
            run.succeed(run.as_succeeded(jobs_pb2.JobResult()))
    assert seen == [1, 2, 3, 4]


async def test_closed_run_ends_its_watches_with_an_error() -> None:
    run = Run("kind", jobs_pb2.JobKey(job_id="a"), "digest")
    watch = run.watch(0, "", CLOSED)
    assert (await anext(watch)).sequence == 1
    run.close()
    with pytest.raises(UnavailableError):
        await anext(watch)
    assert run.outcome == "interrupted"


def test_digest_is_of_the_work_not_of_who_asks(tmp_path: Path) -> None:
    def request(job_id: str, seed: int) -> generator_pb2.StartSynthesizeRequest:
        return generator_pb2.StartSynthesizeRequest(
            key=jobs_pb2.JobKey(job_id=job_id), synthesis=common_pb2.SynthesisConfig(seed=seed)
        )

    digest = request_digest("synthesize", request("a", 1))
    assert digest == request_digest("synthesize", request("b", 1))
    assert digest != request_digest("synthesize", request("a", 2))
    assert digest != request_digest("other", request("a", 1))
    records = JobRecords(ArtifactStore(tmp_path.as_uri()))
    records.claim("a", digest)
    records.claim("a", digest)
    with pytest.raises(AlreadyExistsError) as caught:
        records.claim("a", "another")
    assert caught.value.reason == "JOB_ID_TAKEN"
    assert records.load_success("a") is None
