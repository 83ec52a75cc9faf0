"""Prometheus metrics that all servers share; docs/metrics.md lists them. A service's own are in its `metrics.py`.

Labels are bounded: methods, codes, kinds of jobs and names of losses, never an id and never a user's text.
"""

from services.common.metrics.artifacts import ARTIFACT_BYTES, CACHE_REMOVED_BYTES, artifact_operation
from services.common.metrics.build import show_build
from services.common.metrics.children import CHILDREN
from services.common.metrics.disk import DISKS
from services.common.metrics.gpu import show_gpus
from services.common.metrics.jobs import (
    JOB_DEATHS,
    JOB_SECONDS,
    JOB_WAIT_SECONDS,
    JOBS,
    JOBS_QUEUED,
    JOBS_RUNNING,
    QUEUE_AGES,
    show_jobs,
)
from services.common.metrics.relay import Sums, add_sums, sums_since, take_sums
from services.common.metrics.rpc import MethodMetrics, count_unknown_method
from services.common.metrics.server import MetricsServer
from services.common.metrics.training import TrainingMetrics

__all__ = [
    "ARTIFACT_BYTES",
    "CACHE_REMOVED_BYTES",
    "CHILDREN",
    "DISKS",
    "JOBS",
    "JOBS_QUEUED",
    "JOBS_RUNNING",
    "JOB_DEATHS",
    "JOB_SECONDS",
    "JOB_WAIT_SECONDS",
    "QUEUE_AGES",
    "MethodMetrics",
    "MetricsServer",
    "Sums",
    "TrainingMetrics",
    "add_sums",
    "artifact_operation",
    "count_unknown_method",
    "show_build",
    "show_gpus",
    "show_jobs",
    "sums_since",
    "take_sums",
]
