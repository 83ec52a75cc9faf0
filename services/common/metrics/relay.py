"""Hands a job's process' counts over to its server: nobody scrapes the process, and it is gone by the next scrape."""

import resource
import time
from collections.abc import Mapping

from prometheus_client import Counter

from services.common.metrics.artifacts import ARTIFACT_BYTES, ARTIFACT_ERRORS, ARTIFACT_OPERATIONS, ARTIFACT_SECONDS
from services.common.metrics.children import JOB_CPU_SECONDS

Sums = dict[str, dict[str, float]]
"""Value of each counter by name and label."""

# Each has one label.
_COUNTERS: dict[str, Counter] = {
    "bytes": ARTIFACT_BYTES,
    "operations": ARTIFACT_OPERATIONS,
    "seconds": ARTIFACT_SECONDS,
    "errors": ARTIFACT_ERRORS,
}
_CPU = "cpu"


def take_sums() -> Sums:
    """Return what this process has counted so far; its CPU time includes that of its children that have ended."""
    sums = {name: _values(counter) for name, counter in _COUNTERS.items()}
    times = time.process_time(), _ended_children_seconds()
    return {**sums, _CPU: {"": sum(times)}}


def _values(counter: Counter) -> dict[str, float]:
    (family,) = counter.collect()
    return {next(iter(s.labels.values())): s.value for s in family.samples if s.name.endswith("_total")}


def _ended_children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def sums_since(now: Sums, before: Sums) -> Sums:
    """Return what was added from one moment to a later one, without zeros."""
    added = {
        name: {label: value - before.get(name, {}).get(label, 0.0) for label, value in values.items()}
        for name, values in now.items()
    }
    return {name: kept for name, values in added.items() if (kept := {k: v for k, v in values.items() if v > 0})}


def add_sums(kind: str, sums: Mapping[str, Mapping[str, float]]) -> None:
    """Add what the process of a job of this kind has counted to this process' counters."""
    for name, values in sums.items():
        for label, value in values.items():
            if name == _CPU:
                JOB_CPU_SECONDS.labels(kind).inc(value)
            else:
                _COUNTERS[name].labels(label).inc(value)
