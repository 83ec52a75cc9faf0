"""The coordinator's metrics."""

from collections.abc import Callable, Iterator

from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.coordinator.transitions import State, state_name

STAGE_SECONDS = Histogram(
    "granq_pipeline_stage_duration_seconds",
    "Time from the begin of a stage, in this process, to its end.",
    ["stage", "outcome"],
    buckets=(1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600),
)
JOB_RETRIES = Counter("granq_pipeline_job_retries", "Repeated starts of worker jobs, by cause.", ["worker", "reason"])


class PipelineCollector(Collector):
    """Counts pipelines by state at the moment of a scrape, so that nothing has to be counted in between.

    Args:
        counts: Returns how many pipelines are in each state; called from the metrics server's thread.
    """

    def __init__(self, counts: Callable[[], dict[int, int]]) -> None:
        self._counts = counts

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Return the metrics without values, so that registering asks no database."""
        yield GaugeMetricFamily("granq_pipelines", "Pipelines by state.", labels=["state"])
        yield GaugeMetricFamily("granq_pipeline_queue_depth", "Pipelines that wait for their first stage.")

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the metrics as they are now."""
        counts = self._counts()
        by_state = GaugeMetricFamily("granq_pipelines", "Pipelines by state.", labels=["state"])
        for state in State.values():
            if state != State.PIPELINE_STATE_UNSPECIFIED:
                by_state.add_metric([state_name(state).lower()], counts.get(state, 0))
        yield by_state
        queued = counts.get(State.PIPELINE_STATE_QUEUED, 0)
        yield GaugeMetricFamily(
            "granq_pipeline_queue_depth", "Pipelines that wait for their first stage.", value=queued
        )

    def register(self) -> None:
        """Let scrapes see the metrics."""
        REGISTRY.register(self)

    def unregister(self) -> None:
        """Take the metrics back."""
        REGISTRY.unregister(self)
