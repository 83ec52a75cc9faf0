"""The state machine: every change with its event, numbers without gaps, and lost attempts refused."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from granq.v1 import common_pb2, coordinator_pb2, reports_pb2
from services.common.errors import FailedPreconditionError, NotFoundError
from services.coordinator.requests import Stage
from services.coordinator.transitions import JobCursor, State, SupersededError
from tests.support.pipelines import ME, Database, progress

SYNTHESIS = coordinator_pb2.PipelineResults(synthesis=reports_pb2.SynthesisResult(num_images=7))
BROKEN = common_pb2.Failure(code=9, reason="BROKEN", message="it broke")


def test_a_whole_life_leaves_one_event_per_change(database: Database) -> None:
    name = database.create()
    change = database.transitions
    assert change.enter_stage(name, 1, Stage.STAGE_VALIDATE)
    change.record_progress(name, 1, progress(1), "job", JobCursor("run", 1))
    change.finish_stage(name, 1, Stage.STAGE_VALIDATE, coordinator_pb2.PipelineResults(), last=False)
    assert change.enter_stage(name, 1, Stage.STAGE_REPORT)
    change.finish_stage(name, 1, Stage.STAGE_REPORT, coordinator_pb2.PipelineResults(), last=True)
    events = database.repository.events(name, 0, 100)
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert [event.state for event in events] == [
        State.PIPELINE_STATE_QUEUED,
        State.PIPELINE_STATE_RUNNING,
        State.PIPELINE_STATE_RUNNING,
        State.PIPELINE_STATE_RUNNING,
        State.PIPELINE_STATE_SUCCEEDED,
    ]
    assert [event.HasField("progress") for event in events] == [False, False, True, False, False]
    pipeline = database.repository.get(name).pipeline
    assert pipeline.state == State.PIPELINE_STATE_SUCCEEDED
    assert pipeline.last_sequence == 5
    assert pipeline.HasField("start_time")
    assert pipeline.end_time.ToMicroseconds() >= pipeline.start_time.ToMicroseconds()


def test_numbers_have_no_gaps_under_concurrent_writers(database: Database) -> None:
    name = database.create()
    database.transitions.enter_stage(name, 1, Stage.STAGE_QUANTIZE)
    with ThreadPoolExecutor(8) as pool:
        writes = [
            pool.submit(database.transitions.record_progress, name, 1, progress(step), "job", JobCursor("run", step))
            for step in range(60)
        ]
        for write in writes:
            write.result()
    assert database.sequences(name) == list(range(1, 63))


def test_a_stage_that_is_done_is_not_entered_again(database: Database) -> None:
    name = database.create()
    assert database.transitions.enter_stage(name, 1, Stage.STAGE_SYNTHESIZE)
    assert database.transitions.enter_stage(name, 1, Stage.STAGE_SYNTHESIZE)  # a restart in the middle
    assert database.sequences(name) == [1, 2]
    database.transitions.finish_stage(name, 1, Stage.STAGE_SYNTHESIZE, SYNTHESIS, last=False)
    database.transitions.finish_stage(name, 1, Stage.STAGE_SYNTHESIZE, SYNTHESIS, last=False)
    assert not database.transitions.enter_stage(name, 1, Stage.STAGE_SYNTHESIZE)
    assert database.repository.get(name).pipeline.results == SYNTHESIS


def test_a_retry_keeps_results_and_refuses_the_old_attempt(database: Database) -> None:
    name = database.create()
    change = database.transitions
    with pytest.raises(FailedPreconditionError, match="QUEUED"):
        change.retry(name, ME)
    change.enter_stage(name, 1, Stage.STAGE_SYNTHESIZE)
    change.finish_stage(name, 1, Stage.STAGE_SYNTHESIZE, SYNTHESIS, last=False)
    change.enter_stage(name, 1, Stage.STAGE_QUANTIZE)
    database.repository.open_job(name, "job", "quantizer")
    change.fail(name, 1, BROKEN)
    assert database.repository.get(name).pipeline.failure == BROKEN
    assert database.repository.events(name, 3, 9)[0].failure == BROKEN
    assert change.retry(name, ME) == 2
    pipeline = database.repository.get(name).pipeline
    assert pipeline.state == State.PIPELINE_STATE_QUEUED
    assert pipeline.results == SYNTHESIS
    assert not pipeline.HasField("failure")
    assert not pipeline.HasField("end_time")
    assert database.repository.open_jobs(name) == []
    with pytest.raises(SupersededError):
        change.record_progress(name, 1, progress(1), "job", JobCursor())
    with pytest.raises(SupersededError):
        change.check_owned(name, 1)
    assert change.enter_stage(name, 2, Stage.STAGE_QUANTIZE)
    assert database.sequences(name) == list(range(1, 7))


def test_cancelling_refuses_the_workflow_and_ends_cancelled(database: Database) -> None:
    name = database.create()
    change = database.transitions
    change.enter_stage(name, 1, Stage.STAGE_VALIDATE)
    assert change.request_cancel(name)
    assert change.request_cancel(name)  # asked for again: no second event
    for write in (
        lambda: change.fail(name, 1, BROKEN),
        lambda: change.enter_stage(name, 1, Stage.STAGE_SYNTHESIZE),
        lambda: change.finish_stage(name, 1, Stage.STAGE_REPORT, SYNTHESIS, last=True),
    ):
        with pytest.raises(SupersededError):
            write()
    change.finish_cancel(name)
    change.finish_cancel(name)
    assert not change.request_cancel(name)
    assert [event.state for event in database.repository.events(name, 2, 9)] == [
        State.PIPELINE_STATE_CANCELLING,
        State.PIPELINE_STATE_CANCELLED,
    ]


def test_adopting_happens_once(database: Database) -> None:
    name = database.create()
    with ThreadPoolExecutor(4) as pool:
        adopted = list(pool.map(lambda who: database.transitions.adopt(name, 1, who, BROKEN), ("a", "b", "c", "d")))
    assert sorted(adopted, key=str) == [2, None, None, None]
    assert database.sequences(name) == [1, 2]


def test_unknown_pipelines_are_not_found(database: Database) -> None:
    with pytest.raises(NotFoundError):
        database.transitions.request_cancel("none")
    with pytest.raises(NotFoundError):
        database.transitions.retry("none", ME)
    with pytest.raises(SupersededError):
        database.transitions.enter_stage("none", 1, Stage.STAGE_VALIDATE)
    database.transitions.finish_cancel("none")


def test_job_cursors_are_kept(database: Database) -> None:
    name = database.create()
    database.transitions.enter_stage(name, 1, Stage.STAGE_QUANTIZE)
    assert database.repository.open_job(name, "job", "quantizer") == JobCursor()
    database.transitions.record_progress(name, 1, progress(3), "job", JobCursor("run", 12))
    assert database.repository.open_job(name, "job", "quantizer") == JobCursor("run", 12)
    database.repository.close_job(name, "job")
    assert database.repository.open_jobs(name) == []
