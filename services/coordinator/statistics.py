"""Figures over all pipelines of a database."""

from dataclasses import dataclass

from sqlalchemy import Engine, and_, func, select

from services.coordinator.database import read_session
from services.coordinator.tables import EventRow, JobRow, PipelineRow
from services.coordinator.transitions import State, now_us


@dataclass(frozen=True)
class Statistics:
    """How things stand.

    Attributes:
        by_state: Number of pipelines in each state.
        queue_oldest_seconds: Longest time that a QUEUED pipeline waits; 0 without one.
        stages: Of each stage that a RUNNING pipeline is in, how many are, and the longest time since an event of one.
        open_jobs: Of each worker that RUNNING pipelines have jobs at, or want to have, how many.
    """

    by_state: dict[int, int]
    queue_oldest_seconds: float
    stages: dict[int, tuple[int, float]]
    open_jobs: dict[str, int]


def read_statistics(engine: Engine) -> Statistics:
    """Return the figures as they are now."""
    now = now_us()
    last_event = and_(EventRow.pipeline_id == PipelineRow.pipeline_id, EventRow.sequence == PipelineRow.last_sequence)
    # A pipeline gets an event whenever anything about it changes, so the last one tells how long nothing has.
    since = func.min(func.coalesce(EventRow.time, PipelineRow.create_time))
    quiet = (
        select(PipelineRow.state, PipelineRow.stage, func.count(), since)
        .outerjoin(EventRow, last_event)
        .where(PipelineRow.state.in_((State.PIPELINE_STATE_QUEUED, State.PIPELINE_STATE_RUNNING)))
        .group_by(PipelineRow.state, PipelineRow.stage)
    )
    counts = select(PipelineRow.state, func.count()).group_by(PipelineRow.state)
    jobs = (
        select(JobRow.worker, func.count())
        .join(PipelineRow, PipelineRow.pipeline_id == JobRow.pipeline_id)
        .where(PipelineRow.state == State.PIPELINE_STATE_RUNNING)
        .group_by(JobRow.worker)
    )
    with read_session(engine) as session:
        by_state = {row[0]: row[1] for row in session.execute(counts)}
        open_jobs = {row[0]: row[1] for row in session.execute(jobs)}
        rows = session.execute(quiet).all()
    queued = [max(0, now - oldest) / 1e6 for state, _, _, oldest in rows if state == State.PIPELINE_STATE_QUEUED]
    stages = {
        stage: (count, max(0, now - oldest) / 1e6)
        for state, stage, count, oldest in rows
        if state == State.PIPELINE_STATE_RUNNING
    }
    return Statistics(by_state, max(queued, default=0.0), stages, open_jobs)
