"""Room on the disks that a server writes to."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prometheus_client import REGISTRY
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.common.settings import ServerSettings


def disks(settings: ServerSettings) -> dict[str, Path]:
    """Return a folder on each disk that a server writes to, by use."""
    found = {"scratch": Path(tempfile.gettempdir())}
    parts = urlsplit(settings.artifact_url)
    if parts.scheme == "file":
        found["artifacts"] = Path(unquote(parts.path))
    elif settings.cache_dir is not None:
        found["cache"] = settings.cache_dir
    return found


class DiskCollector(Collector):
    """Size and free space of file systems, looked at when Prometheus asks."""

    def __init__(self) -> None:
        self._folders: dict[str, Path] = {}

    @contextmanager
    def shown(self, settings: ServerSettings) -> Iterator[None]:
        """Show the disks of a server within the block."""
        self._folders = disks(settings)
        try:
            yield
        finally:
            self._folders = {}

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Return the metrics without values."""
        volumes = "holds artifacts, local copies of a remote store (cache), or temporary files (scratch)"
        yield GaugeMetricFamily("granq_disk_size_bytes", f"Size of the file system that {volumes}.", labels=["volume"])
        yield GaugeMetricFamily(
            "granq_disk_free_bytes", f"Room for this user on the file system that {volumes}.", labels=["volume"]
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the metrics as they are now; a folder that cannot be looked at is left out."""
        size, free = self.describe()
        for volume, folder in self._folders.items():
            try:
                usage = shutil.disk_usage(folder)
            except OSError:
                continue  # artifact errors tell of a store that is away
            size.add_metric([volume], usage.total)
            free.add_metric([volume], usage.free)
        yield size
        yield free


DISKS = DiskCollector()
REGISTRY.register(DISKS)
