"""What the processes of jobs use."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import psutil
from prometheus_client import REGISTRY, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

JOB_CPU_SECONDS = Counter(
    "granq_job_cpu_seconds", "CPU time, user and system, that processes of jobs reported to have used.", ["kind"]
)


class ChildProcesses(Collector):
    """Memory of running jobs, each with the processes that it began; looked at when Prometheus asks."""

    def __init__(self) -> None:
        self._pids: dict[int, str] = {}
        self._kinds: set[str] = set()
        self._lock = Lock()

    @contextmanager
    def watched(self, pid: int, kind: str) -> Iterator[None]:
        """Show a process under a kind of job."""
        with self._lock:
            self._pids[pid] = kind
            self._kinds.add(kind)
        try:
            yield
        finally:
            with self._lock:
                del self._pids[pid]

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Return the metric without values."""
        yield GaugeMetricFamily(
            "granq_job_resident_memory_bytes",
            "Resident memory of the running jobs' processes and of those that they began.",
            labels=["kind"],
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the metric as it is now."""
        (family,) = self.describe()
        with self._lock:
            used = dict.fromkeys(self._kinds, 0)
            pids = dict(self._pids)
        for pid, kind in pids.items():
            used[kind] += _resident_bytes(pid)
        for kind, size in used.items():
            family.add_metric([kind], size)
        yield family


def _resident_bytes(pid: int) -> int:
    """Return the memory of a process and of those below it; of those that end meanwhile, nothing."""
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


CHILDREN = ChildProcesses()
REGISTRY.register(CHILDREN)
