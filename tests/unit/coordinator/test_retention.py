"""What nothing refers to is removed, and nothing else; on both databases, with a real store."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from granq.v1 import coordinator_pb2, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.jobs.context import CheckpointRecord, checkpoint_ref
from services.coordinator.locks import ExecutorLocks
from services.coordinator.references import References, digests_in, seconds_ago
from services.coordinator.requests import STAGES, stage_calls
from services.coordinator.retention import Retention, RetentionPolicy, forget_jobs, note_upload
from services.coordinator.threads import Threads
from services.coordinator.transitions import State
from tests.support.pipelines import ME, Database, results, spec

GRACE, UPLOADS, JOBS = 100.0, 1_000.0, 10_000.0
VALIDATE, REPORT = STAGES[0][0], STAGES[-1][0]


class Tidy:
    """Retention over a store whose files can be made old."""

    def __init__(self, database: Database, store: ArtifactStore, folder: Path, keep: float | None = None) -> None:
        self.database, self.store, self._folder = database, store, folder
        self.deleted: list[str] = []
        self.retention = Retention(
            references=References(database.engine),
            store=store,
            threads=Threads(2, "retention"),
            locks=ExecutorLocks(database.url),
            delete=self._delete,
            policy=RetentionPolicy(GRACE, UPLOADS, JOBS, keep, 3600),
        )

    async def _delete(self, pipeline_id: str) -> None:
        self.deleted.append(pipeline_id)
        self.database.repository.delete(pipeline_id)
        forget_jobs(self.store, pipeline_id)

    def age(self, seconds: float) -> None:
        """Make everything that the store holds older."""
        for path in self._folder.rglob("*"):
            if path.is_file():
                written = path.stat().st_mtime - seconds
                os.utime(path, (written, written))

    def put(self, content: str) -> str:
        return self.store.put_bytes(content.encode()).digest

    def submit(self, model: str) -> str:
        made = spec()
        made.model.artifact.digest = model
        return self.database.repository.create(made, "", ME)[0].pipeline_id

    def succeed(self, pipeline_id: str, made: coordinator_pb2.PipelineResults) -> None:
        transitions = self.database.transitions
        transitions.enter_stage(pipeline_id, 1, REPORT)
        transitions.finish_stage(pipeline_id, 1, REPORT, made, last=True)


@pytest.fixture
async def tidy(database: Database, store: ArtifactStore, tmp_path: Path) -> AsyncIterator[Tidy]:
    made = Tidy(database, store, tmp_path / "artifacts")
    yield made
    await made.retention.close()


async def test_what_pipelines_name_stays_and_the_rest_goes(tidy: Tidy) -> None:
    model, stray = tidy.put("model"), tidy.put("stray")
    pipeline_id = tidy.submit(model)
    made = results(tidy.store)
    tidy.succeed(pipeline_id, made)
    held_before = digests_in(made.SerializeToString()) & set(tidy.store.blob_ages())
    assert len(held_before) > 5
    tidy.age(2 * GRACE)
    young = tidy.put("young")
    await tidy.retention.tidy()
    assert not tidy.store.exists(stray)
    held = digests_in(made.SerializeToString())
    assert held & set(tidy.store.blob_ages()) == held_before, "something that the results name is gone"
    assert tidy.store.exists(model)
    assert tidy.store.exists(young)


async def test_what_was_deleted_goes_unless_another_pipeline_names_it(tidy: Tidy) -> None:
    model, own, shared = tidy.put("model"), tidy.put("own"), tidy.put("shared")
    first, second = tidy.submit(model), tidy.submit(model)
    for name, digests in ((first, (own, shared)), (second, (shared,))):
        made = coordinator_pb2.PipelineResults()
        made.quantization.model.digest = digests[0]
        made.synthesis.dataset.digest = digests[-1]
        tidy.succeed(name, made)
    tidy.database.repository.delete(first)
    tidy.age(2 * GRACE)
    await tidy.retention.tidy()
    assert [tidy.store.exists(digest) for digest in (model, own, shared)] == [True, False, True]


async def test_what_a_job_may_need_stays(tidy: Tidy) -> None:
    running, done = tidy.submit(tidy.put("model")), tidy.submit(tidy.put("model"))
    tidy.succeed(done, coordinator_pb2.PipelineResults())
    kept: dict[str, list[str]] = {}
    for name in (running, done):
        (call,) = stage_calls(VALIDATE, tidy.database.repository.get(name).pipeline)
        result, checkpoint, needed = (tidy.put(f"{what} of {name}") for what in ("result", "checkpoint", "state"))
        job = jobs_pb2.Job(key=call.request.key)
        job.result.quantization.model.digest = result
        tidy.store.set_ref(f"jobs/{call.job_id}/result", job.SerializeToString())
        record = CheckpointRecord(form="1", artifact="", needs=[checkpoint, needed])
        tidy.store.set_ref(checkpoint_ref(call.job_id), record.model_dump_json().encode())
        kept[name] = [result, checkpoint, needed]
    tidy.store.set_ref("timing-caches/a", tidy.put("cache").encode())
    tidy.age(2 * GRACE)
    await tidy.retention.tidy()
    assert all(tidy.store.exists(digest) for digest in kept[running])
    assert not any(tidy.store.exists(digest) for digest in kept[done]), "its results are in the database"
    assert not tidy.store.list_refs(f"jobs/{done}")
    assert len(tidy.store.list_refs(f"jobs/{running}")) == 2
    assert tidy.store.exists(tidy.put("cache"))


async def test_uploads_and_jobs_without_a_pipeline_have_their_own_times(tidy: Tidy) -> None:
    upload, result = tidy.put("upload"), tidy.put("result")
    note_upload(tidy.store, upload)
    tidy.store.set_ref("jobs/by-hand/result", result.encode())
    for seconds, there in ((2 * GRACE, (True, True)), (UPLOADS, (False, True)), (JOBS, (False, False))):
        tidy.age(seconds)
        await tidy.retention.tidy()
        assert (tidy.store.exists(upload), tidy.store.exists(result)) == there, seconds


async def test_what_is_stored_again_is_young_again(tidy: Tidy) -> None:
    digest = tidy.put("the same")
    tidy.age(2 * GRACE)
    found = tidy.retention._references.digests
    tidy.retention._references.digests = lambda: (tidy.put("the same"), found())[1]  # type: ignore[method-assign]
    await tidy.retention.tidy()
    assert tidy.store.exists(digest)


async def test_a_pipeline_submitted_meanwhile_keeps_its_model(tidy: Tidy) -> None:
    model = tidy.put("model")
    tidy.age(2 * GRACE)
    found = tidy.retention._references.digests

    def submitted_right_after() -> set[str]:
        digests = found()
        tidy.submit(model)
        return digests

    tidy.retention._references.digests = submitted_right_after  # type: ignore[method-assign]
    await tidy.retention.tidy()
    assert tidy.store.exists(model)


async def test_no_pipeline_is_submitted_in_the_moment_of_a_removal(tidy: Tidy) -> None:
    model, submitted = tidy.put("model"), threading.Event()

    def submit() -> None:
        tidy.submit(model)
        submitted.set()

    submitting: list[asyncio.Future[None]] = []

    def remove(digest: str) -> int:
        loop.call_soon_threadsafe(lambda: submitting.append(asyncio.ensure_future(asyncio.to_thread(submit))))
        assert not submitted.wait(0.5), "a pipeline came while its model was being removed"
        return 1

    loop = asyncio.get_running_loop()
    references = References(tidy.database.engine)
    assert await asyncio.to_thread(references.unless_named, [model], seconds_ago(0), remove) == 1
    await asyncio.gather(*submitting)
    assert submitted.is_set()


async def test_the_store_of_another_database_is_left_alone(tidy: Tidy, tmp_path: Path) -> None:
    stray = tidy.put("stray")
    tidy.store.set_ref("retention/database", b"another")
    tidy.age(2 * GRACE)
    await tidy.retention.tidy()
    assert tidy.store.exists(stray)
    tidy.store.delete_ref("retention/database")
    await tidy.retention.tidy()
    assert not tidy.store.exists(stray)


async def test_one_at_a_time(tidy: Tidy) -> None:
    stray = tidy.put("stray")
    tidy.age(2 * GRACE)
    other = ExecutorLocks(tidy.database.url).lock("granq retention")
    assert other.try_acquire()
    await tidy.retention.tidy()
    assert tidy.store.exists(stray)
    other.release()
    await tidy.retention.tidy()
    assert not tidy.store.exists(stray)


async def test_old_pipelines_go_with_their_artifacts(sqlite: Database, store: ArtifactStore, tmp_path: Path) -> None:
    tidy = Tidy(sqlite, store, tmp_path / "artifacts", keep=0.0)
    model = tidy.put("model")
    ended, running = tidy.submit(model), tidy.submit(model)
    made = coordinator_pb2.PipelineResults()
    made.quantization.model.digest = tidy.put("weights")
    tidy.succeed(ended, made)
    tidy.age(2 * GRACE)
    await tidy.retention.tidy()
    await tidy.retention.close()
    assert tidy.deleted == [ended]
    assert not store.exists(made.quantization.model.digest)
    assert store.exists(model)
    assert sqlite.repository.get(running).pipeline.state == State.PIPELINE_STATE_QUEUED
