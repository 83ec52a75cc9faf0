"""Metrics and traces of how long pipelines wait and live; told by `transitions` once the change is committed."""

from prometheus_client import Histogram

from services.common import tracing

_BUCKETS = (1, 10, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 7 * 24 * 3600)
PIPELINE_WAIT_SECONDS = Histogram(
    "granq_pipeline_wait_seconds", "Time from a pipeline's submission to its first stage.", buckets=_BUCKETS
)
PIPELINE_SECONDS = Histogram(
    "granq_pipeline_duration_seconds",
    "Time from a pipeline's submission to its end, by outcome; one that is retried ends again.",
    ["outcome"],
    buckets=_BUCKETS,
)
for _outcome in ("succeeded", "failed", "cancelled"):
    # From the start, so that the first one shows as an increase.
    PIPELINE_SECONDS.labels(_outcome)


def observe_wait(create_us: int, now_us: int) -> None:
    """Note that the first stage of a pipeline begins. Times are in microseconds since the epoch."""
    PIPELINE_WAIT_SECONDS.observe(max(0, now_us - create_us) / 1e6)


def observe_end(pipeline_id: str, attempt: int, outcome: str, create_us: int, now_us: int) -> None:
    """Note that a pipeline ended as succeeded, failed or cancelled; its id goes with the value as an exemplar."""
    exemplar = {"pipeline_id": pipeline_id}
    if tracing.enabled():
        exemplar["trace_id"] = tracing.pipeline_trace(pipeline_id, attempt)["traceparent"].split("-")[1]
    PIPELINE_SECONDS.labels(outcome).observe(max(0, now_us - create_us) / 1e6, exemplar)
    tracing.record_pipeline(pipeline_id, attempt, outcome, create_us, now_us)
