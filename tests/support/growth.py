"""Samples of what servers use, and the judgement whether it grows."""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg

from tests.support.chaos.rig import Deployment

TABLES = (
    "pipelines",
    "pipeline_events",
    "pipeline_jobs",
    "dbos.workflow_status",
    "dbos.operation_outputs",
)


@dataclass(frozen=True)
class Allowed:
    """How much more may be used at the end than after the warm-up: a part of it, and a number beside."""

    share: float
    constant: float

    def of(self, before: float) -> float:
        """Return the most that is allowed."""
        return before * (1 + self.share) + self.constant


MIB = 1024 * 1024
LIMITS = {
    "resident memory": Allowed(0.05, 6 * MIB),
    "file descriptors": Allowed(0.0, 6),
    "threads": Allowed(0.0, 4),
    "rows": Allowed(0.3, 60),
    "files": Allowed(0.3, 60),
}
"""Connections and threads of pools come and go by a few; rows and files swing between two rounds of retention."""


@dataclass(frozen=True)
class Verdict:
    """What became of one measure."""

    name: str
    before: float
    after: float
    allowed: float

    @property
    def grew(self) -> bool:
        """Whether it is more than allowed."""
        return self.after > self.allowed


class Samples:
    """Series of measures by name, such as "coordinator: threads"."""

    def __init__(self) -> None:
        self._series: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        """Note a value. The name ends with a measure of `LIMITS`."""
        self._series[name].append(value)

    def write(self, path: Path) -> None:
        """Write each series, in the order of its values, as JSON by name."""
        path.write_text(json.dumps(self._series, indent=1))

    def verdicts(self) -> list[Verdict]:
        """Compare the second and the last third, by their medians; the first is the warm-up.

        Memory goes by the lower quartiles: gRPC's receive buffers of 4 MiB come and go, and a leak lies below them.

        Raises:
            ValueError: There are less than nine samples of something.
        """
        found = []
        for name, values in self._series.items():
            third = len(values) // 3
            if third < 3:
                raise ValueError(f"{name} has {len(values)} samples, too few to judge")
            place = 0 if name.endswith("memory") else 1
            before, after = (
                statistics.quantiles(part, n=4)[place] for part in (values[third : 2 * third], values[2 * third :])
            )
            limit = next(allowed for measure, allowed in LIMITS.items() if name.endswith(measure))
            found.append(Verdict(name, before, after, limit.of(before)))
        return found


def sample(deployment: Deployment, samples: Samples) -> None:
    """Note what the servers of a deployment use now, their jobs' processes left out, and the sizes of its tables."""
    for server in deployment.servers:
        process = psutil.Process(server.server.pid)
        with process.oneshot():
            samples.add(f"{server.server.name}: resident memory", process.memory_info().rss)
            samples.add(f"{server.server.name}: threads", process.num_threads())
        samples.add(f"{server.server.name}: file descriptors", process.num_fds())
    name = deployment.folder.name
    with psycopg.connect(deployment.database_url) as connection:
        for table in TABLES:
            (count,) = connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() or (0,)
            samples.add(f"{name}, {table}: rows", count)
    for kind in ("blobs", "refs"):
        files = sum(path.is_file() for path in (deployment.folder / "artifacts" / kind).rglob("*"))
        samples.add(f"{name}, store/{kind}: files", files)
