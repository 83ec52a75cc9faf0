"""Timing caches: what a builder measured of its kernels, kept so that the next build on the same device is faster.

A cache holds for one runtime version, device and driver, and is named after them. It only saves time: whatever is wrong
with one, the build goes on without it.
"""

import re
from pathlib import Path
from typing import Protocol

from granq.engines.machine import UNKNOWN_VERSION, driver_version, find_gpu
from granq.v1 import artifacts_pb2
from services.common.errors import DataLossError, NotFoundError
from services.evaluator.runtimes import EngineRuntime

_OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9.-]+")


class CacheStore(Protocol):
    """Where caches are kept: what they need of an ArtifactStore, which a device has none of."""

    def get_ref(self, name: str) -> bytes | None:
        """Return what a name refers to."""

    def set_ref(self, name: str, data: bytes) -> None:
        """Make a name refer to something else."""

    def read_bytes(self, digest: str) -> bytes:
        """Return a blob."""

    def put_file(self, path: Path, name: str = "", media_type: str = "") -> artifacts_pb2.Artifact:
        """Store a copy of a file."""


def cache_name_of(runtime: EngineRuntime) -> str | None:
    """Return the name of this machine's cache in the store, or None where the runtime keeps none or no GPU is there."""
    gpu = find_gpu()
    if not runtime.timing_cache or gpu is None:
        return None
    parts = (
        runtime.module,
        runtime.version() or UNKNOWN_VERSION,
        gpu.name,
        gpu.compute_capability,
        driver_version() or UNKNOWN_VERSION,
    )
    return "timing-caches/" + "/".join(_OTHER_CHARACTERS.sub("_", part) for part in parts)


def fetch_cache(store: CacheStore, name: str, path: Path) -> bool:
    """Write the named cache to a file; return whether there was one."""
    data = store.get_ref(name)
    if data is None:
        return False
    try:
        path.write_bytes(store.read_bytes(artifacts_pb2.Artifact.FromString(data).digest))
    except (NotFoundError, DataLossError):
        return False
    return True


def keep_cache(store: CacheStore, name: str, path: Path) -> None:
    """Store a cache that a build wrote; of builds at the same time, the last one's is kept."""
    artifact = store.put_file(path, name="timing.cache", media_type="application/octet-stream")
    store.set_ref(name, artifact.SerializeToString())
