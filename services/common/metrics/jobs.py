"""What a worker tells of its jobs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.common.metrics.children import JOB_CPU_SECONDS

JOBS = Counter("granq_jobs", "Runs of jobs that ended.", ["kind", "outcome"])
JOB_SECONDS = Histogram(
    "granq_job_duration_seconds",
    "Time from a job's start in its process to its end.",
    ["kind", "outcome"],
    buckets=(0.5, 2, 10, 30, 60, 300, 900, 3600, 4 * 3600, 24 * 3600),
)
JOB_WAIT_SECONDS = Histogram(
    "granq_job_wait_seconds",
    "Time that a job waited for a free slot before its process began.",
    ["kind"],
    buckets=(0.1, 1, 10, 60, 300, 900, 3600, 4 * 3600, 24 * 3600),
)
JOBS_RUNNING = Gauge("granq_jobs_running", "Jobs whose process runs.", ["kind"])
JOBS_QUEUED = Gauge("granq_jobs_queued", "Jobs that wait for a free slot.", ["kind"])
JOB_DEATHS = Counter(
    "granq_job_process_deaths", "Processes of jobs that a signal ended, or that left without a word.", ["kind"]
)


def show_jobs(kind: str) -> None:
    """Show the series of a kind of jobs from now on, so that the first of each shows as an increase."""
    JOB_DEATHS.labels(kind)
    JOB_WAIT_SECONDS.labels(kind)
    JOB_CPU_SECONDS.labels(kind)
    for outcome in ("succeeded", "failed"):
        JOBS.labels(kind, outcome)
        JOB_SECONDS.labels(kind, outcome)


class QueueAges(Collector):
    """How long the job that has waited longest waits, at the moment of a scrape."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[object, float]] = {}
        self._lock = Lock()

    @contextmanager
    def waiting(self, kind: str) -> Iterator[None]:
        """Count the time within as that of a waiting job."""
        token = object()
        with self._lock:
            self._waiting.setdefault(kind, {})[token] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._waiting[kind][token]

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Return the metric without values."""
        yield GaugeMetricFamily(
            "granq_job_queue_oldest_seconds",
            "Time that the job which has waited longest waits for a free slot; 0 when none does.",
            labels=["kind"],
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the metric as it is now."""
        (family,) = self.describe()
        now = time.monotonic()
        with self._lock:
            for kind, began in self._waiting.items():
                family.add_metric([kind], now - min(began.values(), default=now))
        yield family


QUEUE_AGES = QueueAges()
REGISTRY.register(QUEUE_AGES)
