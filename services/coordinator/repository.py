"""Reads of pipelines, their events and jobs; and the writes that no state machine guards: create, delete, jobs."""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from sqlalchemy import Engine, delete, select, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, undefer

from granq.v1 import coordinator_pb2
from services.common.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError
from services.common.slots import Place
from services.coordinator.database import read_session
from services.coordinator.grants import revoke
from services.coordinator.messages import to_event, to_pipeline
from services.coordinator.references import while_artifacts_stay
from services.coordinator.tables import EventRow, JobRow, PipelineRow
from services.coordinator.transitions import (
    ENDED,
    JobCursor,
    State,
    add_event,
    deadline_of,
    lock_row,
    now_us,
    state_name,
)

_WHOLE = (undefer(PipelineRow.spec), undefer(PipelineRow.results))


@dataclass(frozen=True)
class Position:
    """Place of a pipeline in the listing, which is ordered by creation time, newest first."""

    create_time: int
    pipeline_id: str


@dataclass(frozen=True)
class DrivenPipeline:
    """A pipeline that has not ended, and who should be driving it."""

    pipeline_id: str
    attempt: int
    executor_id: str
    state: int
    deadline: int | None


@dataclass(frozen=True)
class Snapshot:
    """A pipeline as a stage needs it."""

    pipeline: coordinator_pb2.Pipeline
    attempt: int
    deadline: int | None = None


@dataclass(frozen=True)
class OpenJob:
    """A worker job that may still run."""

    job_id: str
    worker: str


def new_pipeline_id() -> str:
    """Return an id that sorts by time and cannot be guessed from another."""
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(5)


def _request_key(request_id: str, owner: str) -> str:
    """Return what is stored of a request id; a hash cannot be mistaken for a client's id, which has no colon."""
    return f"sha256:{sha256(f'{owner}:{request_id}'.encode()).hexdigest()}" if owner and request_id else request_id


class Repository:
    """The coordinator's stored pipelines."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(
        self, spec: coordinator_pb2.PipelineSpec, request_id: str, executor_id: str, owner: str = ""
    ) -> tuple[coordinator_pb2.Pipeline, bool]:
        """Store a new QUEUED pipeline, or find the one that the same request made before.

        Returns:
            The pipeline, and whether this call made it.

        Raises:
            AlreadyExistsError: The request id belongs to a pipeline with another spec.
        """
        stored = spec.SerializeToString(deterministic=True)
        row = PipelineRow(
            pipeline_id=new_pipeline_id(),
            owner=owner,
            request_id=_request_key(request_id, owner) or None,
            spec=stored,
            state=State.PIPELINE_STATE_QUEUED,
            stage=0,
            attempt=1,
            executor_id=executor_id,
            last_sequence=0,
            results=b"",
            finished_stages=0,
            create_time=now_us(),
            priority=spec.priority,
            deadline=deadline_of(spec),
        )
        try:
            with Session(self._engine, expire_on_commit=False) as session, session.begin():
                while_artifacts_stay(session)
                session.add(row)
                session.flush()
                add_event(session, row)
            return to_pipeline(row), True
        except IntegrityError:
            # Two equal requests may race; the database's unique index decides which one made the pipeline.
            found = self._of_request(request_id, owner, stored)
            if found is None:
                raise
            return found, False

    def find(
        self, spec: coordinator_pb2.PipelineSpec, request_id: str, owner: str = ""
    ) -> coordinator_pb2.Pipeline | None:
        """Return the pipeline that the same request made before, if any.

        Raises:
            AlreadyExistsError: The request id belongs to a pipeline with another spec.
        """
        return self._of_request(request_id, owner, spec.SerializeToString(deterministic=True))

    def _of_request(self, request_id: str, owner: str, stored: bytes) -> coordinator_pb2.Pipeline | None:
        if not request_id:
            return None
        key = _request_key(request_id, owner)
        query = select(PipelineRow).where(PipelineRow.request_id == key).options(*_WHOLE)
        with read_session(self._engine) as session:
            row = session.scalars(query).one_or_none()
            if row is None:
                return None
            if row.spec != stored:
                raise AlreadyExistsError(
                    f"request_id {request_id!r} belongs to pipeline {row.pipeline_id!r}, which has another spec; "
                    "choose a new request_id",
                    field="request_id",
                )
            return to_pipeline(row)

    def get(self, pipeline_id: str) -> Snapshot:
        """Return a pipeline.

        Raises:
            NotFoundError: There is no such pipeline.
        """
        with read_session(self._engine) as session:
            row = session.get(PipelineRow, pipeline_id, options=_WHOLE)
            if row is None:
                raise NotFoundError(f"there is no pipeline {pipeline_id!r}", field="pipeline_id")
            return Snapshot(to_pipeline(row), row.attempt, row.deadline)

    def place(self, pipeline_id: str) -> Place:
        """Return a pipeline's place in a queue; that of one that is gone is the first, where it ends at once."""
        query = select(PipelineRow.priority, PipelineRow.create_time).where(PipelineRow.pipeline_id == pipeline_id)
        with read_session(self._engine) as session:
            found = session.execute(query).one_or_none()
            return (-found.priority, found.create_time) if found is not None else (-1000, 0)

    def owner(self, pipeline_id: str) -> str | None:
        """Return whose a pipeline is; None when there is no such pipeline."""
        with read_session(self._engine) as session:
            return session.scalar(select(PipelineRow.owner).where(PipelineRow.pipeline_id == pipeline_id))

    def page(
        self, states: Sequence[int], after: Position | None, limit: int, owner: str | None = None
    ) -> tuple[list[coordinator_pb2.Pipeline], Position | None]:
        """Return up to ``limit`` pipelines behind a position, of one owner or of all, and the next page's position.

        A page begins behind the last pipeline of the page before, not at a count of rows, so pipelines that come or go
        meanwhile neither repeat nor hide others.
        """
        key = tuple_(PipelineRow.create_time, PipelineRow.pipeline_id)
        query = select(PipelineRow).options(*_WHOLE).limit(limit + 1)
        query = query.order_by(PipelineRow.create_time.desc(), PipelineRow.pipeline_id.desc())
        if owner is not None:
            query = query.where(PipelineRow.owner == owner)
        if states:
            query = query.where(PipelineRow.state.in_(states))
        if after is not None:
            query = query.where(key < tuple_(after.create_time, after.pipeline_id))
        with read_session(self._engine) as session:
            rows = session.scalars(query).all()
            following = None
            if len(rows) > limit:
                following = Position(rows[limit - 1].create_time, rows[limit - 1].pipeline_id)
            return [to_pipeline(row) for row in rows[:limit]], following

    def events(self, pipeline_id: str, after: int, limit: int) -> list[coordinator_pb2.WatchPipelineResponse]:
        """Return up to ``limit`` events behind a number, in order; none when there is no such pipeline."""
        query = select(EventRow).where(EventRow.pipeline_id == pipeline_id, EventRow.sequence > after)
        with read_session(self._engine) as session:
            return [to_event(row) for row in session.scalars(query.order_by(EventRow.sequence).limit(limit))]

    def sequences(self, pipeline_ids: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Return last event number and state of those pipelines that exist."""
        query = select(PipelineRow.pipeline_id, PipelineRow.last_sequence, PipelineRow.state)
        with read_session(self._engine) as session:
            rows = session.execute(query.where(PipelineRow.pipeline_id.in_(list(pipeline_ids))))
            return {pipeline_id: (sequence, state) for pipeline_id, sequence, state in rows}

    def withdraw(self, pipeline_id: str) -> None:
        """Remove a pipeline that nobody has driven yet, as if it had not been submitted."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(PipelineRow).where(PipelineRow.pipeline_id == pipeline_id))
            revoke(session, pipeline_id)

    def delete(self, pipeline_id: str) -> int:
        """Remove a pipeline that has ended, with its events.

        Returns:
            How many attempts it had.

        Raises:
            NotFoundError: There is no such pipeline.
            FailedPreconditionError: It has not ended.
        """
        with Session(self._engine) as session, session.begin():
            row = lock_row(session, pipeline_id)
            if row.state not in ENDED:
                raise FailedPreconditionError(
                    f"pipeline {pipeline_id!r} is {state_name(row.state)}; cancel it before deleting it",
                    reason="PIPELINE_NOT_ENDED",
                    field="pipeline_id",
                )
            session.execute(delete(PipelineRow).where(PipelineRow.pipeline_id == pipeline_id))
            revoke(session, pipeline_id)
            return row.attempt

    def unfinished(self) -> list[DrivenPipeline]:
        """Return the pipelines that have not ended, oldest first."""
        columns = (PipelineRow.pipeline_id, PipelineRow.attempt, PipelineRow.executor_id, PipelineRow.state)
        query = (
            select(*columns, PipelineRow.deadline)
            .where(PipelineRow.state.not_in(ENDED))
            .order_by(PipelineRow.create_time)
        )
        with read_session(self._engine) as session:
            return [DrivenPipeline(*row) for row in session.execute(query)]

    def open_job(self, pipeline_id: str, job_id: str, worker: str) -> JobCursor:
        """Note that a job is about to start, and return how far its events were read before."""
        with Session(self._engine) as session, session.begin():
            row = session.get(JobRow, (pipeline_id, job_id))
            if row is None:
                session.add(JobRow(pipeline_id=pipeline_id, job_id=job_id, worker=worker, run_id="", sequence=0))
                return JobCursor()
            return JobCursor(row.run_id, row.sequence)

    def close_job(self, pipeline_id: str, job_id: str) -> None:
        """Note that a job has ended."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(JobRow).where(JobRow.pipeline_id == pipeline_id, JobRow.job_id == job_id))

    def open_jobs(self, pipeline_id: str) -> list[OpenJob]:
        """Return the jobs of a pipeline that may still run."""
        query = select(JobRow.job_id, JobRow.worker).where(JobRow.pipeline_id == pipeline_id)
        with read_session(self._engine) as session:
            return [OpenJob(*row) for row in session.execute(query)]

    def ended_with_jobs(self) -> list[str]:
        """Return the cancelled and failed pipelines some of whose jobs were not seen to end."""
        query = select(PipelineRow.pipeline_id).join(JobRow, JobRow.pipeline_id == PipelineRow.pipeline_id).distinct()
        with read_session(self._engine) as session:
            return list(session.scalars(query.where(PipelineRow.state.in_(ENDED))))
