"""Stored rows as messages of the contract."""

from typing import cast

from granq.v1 import common_pb2, coordinator_pb2, jobs_pb2
from services.coordinator.tables import EventRow, PipelineRow


def to_pipeline(row: PipelineRow) -> coordinator_pb2.Pipeline:
    """Return a row, with its large columns loaded, as a message."""
    pipeline = coordinator_pb2.Pipeline(
        pipeline_id=row.pipeline_id,
        spec=coordinator_pb2.PipelineSpec.FromString(row.spec),
        state=cast("coordinator_pb2.PipelineState", row.state),
        stage=cast("coordinator_pb2.Stage", row.stage),
        last_sequence=row.last_sequence,
        results=coordinator_pb2.PipelineResults.FromString(row.results),
    )
    if row.progress is not None:
        pipeline.progress.ParseFromString(row.progress)
    if row.failure is not None:
        pipeline.failure.ParseFromString(row.failure)
    pipeline.create_time.FromMicroseconds(row.create_time)
    if row.start_time is not None:
        pipeline.start_time.FromMicroseconds(row.start_time)
    if row.end_time is not None:
        pipeline.end_time.FromMicroseconds(row.end_time)
    return pipeline


def to_event(row: EventRow) -> coordinator_pb2.WatchPipelineResponse:
    """Return a row as a message."""
    event = coordinator_pb2.WatchPipelineResponse(
        sequence=row.sequence,
        state=cast("coordinator_pb2.PipelineState", row.state),
        stage=cast("coordinator_pb2.Stage", row.stage),
        progress=jobs_pb2.Progress.FromString(row.progress) if row.progress is not None else None,
        failure=common_pb2.Failure.FromString(row.failure) if row.failure is not None else None,
    )
    event.time.FromMicroseconds(row.time)
    return event
