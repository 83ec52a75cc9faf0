"""Every change of a pipeline's state, each in one transaction with the event that tells of it.

    QUEUED → RUNNING → SUCCEEDED | FAILED          retry: FAILED | CANCELLED → QUEUED
    QUEUED | RUNNING → CANCELLING → CANCELLED

Writes that a workflow makes carry its attempt number. They are refused with `SupersededError` when the pipeline has
been cancelled, deleted, or given to a newer attempt since: a workflow that lost its pipeline can do no harm, and ends.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Engine, delete
from sqlalchemy.orm import Session

from granq.v1 import common_pb2, coordinator_pb2, jobs_pb2
from services.common.errors import FailedPreconditionError, NotFoundError
from services.coordinator.database import read_session
from services.coordinator.grants import grant
from services.coordinator.lifetimes import observe_end, observe_wait
from services.coordinator.tables import EventRow, JobRow, PipelineRow

State = coordinator_pb2.PipelineState
ENDED = (State.PIPELINE_STATE_SUCCEEDED, State.PIPELINE_STATE_FAILED, State.PIPELINE_STATE_CANCELLED)
_DRIVEN = (State.PIPELINE_STATE_QUEUED, State.PIPELINE_STATE_RUNNING)


class SupersededError(Exception):
    """The pipeline no longer belongs to the attempt that wanted to write."""


@dataclass(frozen=True)
class JobCursor:
    """How far the events of a worker job were read."""

    run_id: str = ""
    sequence: int = 0


def now_us() -> int:
    """Return the time in microseconds since the epoch."""
    return time.time_ns() // 1000


def deadline_of(spec: coordinator_pb2.PipelineSpec) -> int | None:
    """Return when a pipeline that is submitted or retried now must have ended, in microseconds; None for never."""
    return now_us() + spec.max_duration.ToMicroseconds() if spec.HasField("max_duration") else None


def finished(row: PipelineRow, stage: int) -> bool:
    """Return whether the stage's result is stored."""
    return bool(row.finished_stages >> stage & 1)


def add_event(
    session: Session, row: PipelineRow, *, failure: common_pb2.Failure | None = None, progress: bytes | None = None
) -> None:
    """Append an event that shows the row's state as it is now; its number follows the last one."""
    row.last_sequence += 1
    session.add(
        EventRow(
            pipeline_id=row.pipeline_id,
            sequence=row.last_sequence,
            time=now_us(),
            state=row.state,
            stage=row.stage,
            progress=progress,
            failure=failure.SerializeToString() if failure is not None else None,
        )
    )


def lock_row(session: Session, pipeline_id: str) -> PipelineRow:
    """Return the row, locked against other writers until the transaction ends.

    Raises:
        NotFoundError: There is no such pipeline.
    """
    row = session.get(PipelineRow, pipeline_id, with_for_update=True)
    if row is None:
        raise NotFoundError(f"there is no pipeline {pipeline_id!r}", field="pipeline_id")
    return row


def _check_owned(row: PipelineRow | None, pipeline_id: str, attempt: int) -> PipelineRow:
    if row is None or row.attempt != attempt or row.state not in _DRIVEN:
        raise SupersededError(f"attempt {attempt} no longer drives pipeline {pipeline_id}")
    return row


class Transitions:
    """Writes the changes of pipelines.

    Args:
        engine: The coordinator's database.
        changed: Called with the pipeline's id after each committed change, from the thread that made it.
    """

    def __init__(self, engine: Engine, changed: Callable[[str], None]) -> None:
        self._engine = engine
        self._changed = changed

    @contextmanager
    def _owned(self, pipeline_id: str, attempt: int) -> Iterator[tuple[Session, PipelineRow]]:
        with Session(self._engine) as session, session.begin():
            row = session.get(PipelineRow, pipeline_id, with_for_update=True)
            yield session, _check_owned(row, pipeline_id, attempt)
        self._changed(pipeline_id)

    def enter_stage(self, pipeline_id: str, attempt: int, stage: int) -> bool:
        """Make the pipeline RUNNING in this stage.

        Returns:
            False when the stage's result is stored already, and nothing is left to do in it.

        Raises:
            SupersededError: The attempt lost the pipeline.
        """
        with self._owned(pipeline_id, attempt) as (session, row):
            if finished(row, stage):
                return False
            if row.state == State.PIPELINE_STATE_RUNNING and row.stage == stage:
                return True  # the step runs again after a restart; this was told before
            row.state, row.stage, row.progress = State.PIPELINE_STATE_RUNNING, stage, None
            first, row.start_time = row.start_time is None, row.start_time or now_us()
            created, started = row.create_time, row.start_time
            add_event(session, row)
        if first:
            observe_wait(created, started)
        return True

    def record_progress(
        self, pipeline_id: str, attempt: int, progress: jobs_pb2.Progress, job_id: str, cursor: JobCursor
    ) -> None:
        """Store the progress of the running stage, and how far the job's events were read.

        Raises:
            SupersededError: The attempt lost the pipeline.
        """
        with self._owned(pipeline_id, attempt) as (session, row):
            row.progress = progress.SerializeToString()
            job = session.get(JobRow, (pipeline_id, job_id))
            if job is not None:
                job.run_id, job.sequence = cursor.run_id, cursor.sequence
            add_event(session, row, progress=row.progress)

    def check_owned(self, pipeline_id: str, attempt: int) -> None:
        """Do nothing, but only when the attempt still drives the pipeline.

        Raises:
            SupersededError: The attempt lost the pipeline.
        """
        with read_session(self._engine) as session:
            row = session.get(PipelineRow, pipeline_id)
            _check_owned(row, pipeline_id, attempt)

    def record_trouble(self, pipeline_id: str, attempt: int, failure: common_pb2.Failure) -> None:
        """Append an event that announces a repeated attempt, and why.

        Raises:
            SupersededError: The attempt lost the pipeline.
        """
        with self._owned(pipeline_id, attempt) as (session, row):
            add_event(session, row, failure=failure)

    def finish_stage(
        self, pipeline_id: str, attempt: int, stage: int, part: coordinator_pb2.PipelineResults, *, last: bool
    ) -> None:
        """Store what a stage returned; after the last one the pipeline has SUCCEEDED.

        Raises:
            SupersededError: The attempt lost the pipeline.
        """
        with self._owned(pipeline_id, attempt) as (session, row):
            if not finished(row, stage):
                results = coordinator_pb2.PipelineResults.FromString(row.results)
                results.MergeFrom(part)
                grant(session, row.owner, pipeline_id, part)
                row.results = results.SerializeToString(deterministic=True)
                row.finished_stages |= 1 << stage
            session.execute(delete(JobRow).where(JobRow.pipeline_id == pipeline_id))
            if last:
                row.state, row.end_time = State.PIPELINE_STATE_SUCCEEDED, now_us()
                add_event(session, row)
            created = row.create_time
        if last:
            observe_end(pipeline_id, attempt, "succeeded", created, now_us())

    def fail(self, pipeline_id: str, attempt: int, failure: common_pb2.Failure) -> None:
        """Make the pipeline FAILED.

        Raises:
            SupersededError: The attempt lost the pipeline.
        """
        with self._owned(pipeline_id, attempt) as (session, row):
            row.state, row.end_time = State.PIPELINE_STATE_FAILED, now_us()
            row.failure = failure.SerializeToString()
            created = row.create_time
            add_event(session, row, failure=failure)
        observe_end(pipeline_id, attempt, "failed", created, now_us())

    def expire(self, pipeline_id: str, attempt: int, failure: common_pb2.Failure) -> bool:
        """Make a pipeline FAILED whose deadline has passed, whoever drives it; return whether this call did it."""
        with Session(self._engine) as session, session.begin():
            row = session.get(PipelineRow, pipeline_id, with_for_update=True)
            if row is None or row.attempt != attempt or row.state not in _DRIVEN:
                return False
            row.state, row.end_time = State.PIPELINE_STATE_FAILED, now_us()
            row.failure = failure.SerializeToString()
            add_event(session, row, failure=failure)
        self._changed(pipeline_id)
        return True

    def request_cancel(self, pipeline_id: str) -> bool:
        """Make a queued or running pipeline CANCELLING.

        Returns:
            Whether it is CANCELLING now, so that somebody has to carry it through.

        Raises:
            NotFoundError: There is no such pipeline.
        """
        with Session(self._engine) as session, session.begin():
            row = lock_row(session, pipeline_id)
            if row.state in _DRIVEN:
                row.state = State.PIPELINE_STATE_CANCELLING
                add_event(session, row)
            cancelling = row.state == State.PIPELINE_STATE_CANCELLING
        self._changed(pipeline_id)
        return cancelling

    def finish_cancel(self, pipeline_id: str) -> None:
        """Make a CANCELLING pipeline CANCELLED; nothing happens in another state or when it is gone."""
        ended: tuple[int, int] | None = None
        with Session(self._engine) as session, session.begin():
            row = session.get(PipelineRow, pipeline_id, with_for_update=True)
            if row is not None and row.state == State.PIPELINE_STATE_CANCELLING:
                row.state, row.end_time = State.PIPELINE_STATE_CANCELLED, now_us()
                ended = row.attempt, row.create_time
                add_event(session, row)
        if ended is not None:
            observe_end(pipeline_id, ended[0], "cancelled", ended[1], now_us())
        self._changed(pipeline_id)

    def retry(self, pipeline_id: str, executor_id: str) -> int:
        """Queue a FAILED or CANCELLED pipeline again, with the results of its finished stages.

        Returns:
            The number of the new attempt.

        Raises:
            NotFoundError: There is no such pipeline.
            FailedPreconditionError: It is in another state.
        """
        with Session(self._engine) as session, session.begin():
            row = lock_row(session, pipeline_id)
            if row.state not in (State.PIPELINE_STATE_FAILED, State.PIPELINE_STATE_CANCELLED):
                raise FailedPreconditionError(
                    f"pipeline {pipeline_id!r} is {state_name(row.state)}; only FAILED or CANCELLED ones can go on",
                    reason="PIPELINE_NOT_ENDED" if row.state not in ENDED else "PIPELINE_SUCCEEDED",
                    field="pipeline_id",
                )
            row.state, row.executor_id = State.PIPELINE_STATE_QUEUED, executor_id
            row.attempt += 1
            row.failure = row.end_time = row.progress = None
            row.deadline = deadline_of(coordinator_pb2.PipelineSpec.FromString(row.spec))
            # Jobs keep their ids: the stage that failed resumes from its job's checkpoint.
            session.execute(delete(JobRow).where(JobRow.pipeline_id == pipeline_id))
            add_event(session, row)
            attempt = row.attempt
        self._changed(pipeline_id)
        return attempt

    def adopt(self, pipeline_id: str, attempt: int, executor_id: str, why: common_pb2.Failure) -> int | None:
        """Take over a pipeline that nobody drives any more.

        Returns:
            The number of the new attempt, or None when someone else changed the pipeline meanwhile.
        """
        with Session(self._engine) as session, session.begin():
            row = session.get(PipelineRow, pipeline_id, with_for_update=True)
            if row is None or row.attempt != attempt or row.state not in _DRIVEN:
                return None
            row.attempt, row.executor_id = attempt + 1, executor_id
            add_event(session, row, failure=why)
            adopted = row.attempt
        self._changed(pipeline_id)
        return adopted


def state_name(state: int) -> str:
    """Return a state's name as people know it, such as "RUNNING"."""
    return State.Name(state).removeprefix("PIPELINE_STATE_")
