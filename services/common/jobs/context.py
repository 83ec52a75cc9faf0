"""What a job function is given."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, SupportsFloat

import structlog

from granq.v1 import artifacts_pb2, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import CancelledError
from services.common.jobs.reading import Reading
from services.common.settings import ServerSettings
from services.common.tracing import Phases

REPORT_SECONDS = 0.2
"""Least time between two reports of one phase."""


def checkpoint_ref(job_id: str) -> str:
    """Return the name under which the store holds a job's latest checkpoint."""
    return f"jobs/{job_id}/checkpoint"


class JobContext:
    """A running job's way to its server, its store and its log. All methods may be called from any thread.

    Args:
        job_id: The job.
        pipeline_id: Pipeline that asked for it; may be empty.
        store: The artifact store.
        settings: The settings of the service that runs the job.
        log: Logger that carries the job's and the pipeline's id.
        send: Takes each progress that is to be told.
        cancelled: Set when the job must stop.
        limits: Sets the limits under which files from outside are read. Default: none.
    """

    def __init__(
        self,
        job_id: str,
        pipeline_id: str,
        store: ArtifactStore,
        settings: ServerSettings,
        log: structlog.stdlib.BoundLogger,
        send: Callable[[jobs_pb2.Progress], None],
        cancelled: threading.Event,
        limits: Reading = lambda _field, _size: nullcontext(),
    ) -> None:
        self.job_id = job_id
        self.pipeline_id = pipeline_id
        self.store = store
        # Any: each service's jobs know their own subclass, and say so where they read it.
        self.settings: Any = settings
        self.log = log
        self._send = send
        self._cancelled = cancelled
        self.limits = limits
        self._lock = threading.Lock()
        self._phase: str | None = None
        self._spans = Phases()
        self._sent_at = 0.0
        self._pending: tuple[str, int, int, dict[str, SupportsFloat]] | None = None

    def report(self, phase: str, step: int = 0, total: int = 0, **metrics: SupportsFloat) -> None:
        """Tell how far the job is; cheap enough for every iteration.

        Reports of one phase are told at most every 0.2 s, the last one held back always; a new phase and a phase's last
        step (step equal to total) are told at once. Figures are converted only when they are told, so that a tensor on
        a GPU is not waited for in vain.

        Args:
            phase: What the job does now, such as "training".
            step: Steps done.
            total: Steps in all; 0 where unknown.
            metrics: Figures by name. "iterations_per_second", "agreement" (0 to 1) and those that begin with "loss"
                become Prometheus gauges.
        """
        with self._lock:
            now = time.monotonic()
            new_phase = phase != self._phase
            if new_phase:
                self._flush()
                self._spans.enter(phase)
            self._phase = phase
            self._pending = (phase, step, total, metrics)
            if new_phase or (total and step >= total) or now - self._sent_at >= REPORT_SECONDS:
                self._sent_at = now
                self._flush()

    def end_phase(self) -> None:
        """End the span of the last phase, where the job is traced."""
        self._spans.end()

    def flush(self) -> None:
        """Tell the report that was held back, if any."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if self._pending is None:
            return
        phase, step, total, metrics = self._pending
        self._pending = None
        figures = {name: float(value) for name, value in metrics.items()}
        self._send(jobs_pb2.Progress(phase=phase, step=step, total=total, metrics=figures))

    def reading(self, field: str, artifact: artifacts_pb2.Artifact | None = None) -> AbstractContextManager[None]:
        """Return the limits under which to read a file that is not this software's own; a context manager.

        Args:
            field: Field of the request that names it.
            artifact: What it names, fetched here, since that takes as long as the store needs. None for a folder of
                the server's own.

        Raises:
            NotFoundError: The store does not hold the artifact.
            ResourceExhaustedError: Within the block: READ_MEMORY when the file needs more memory than it may have.
        """
        return self.limits(field, 0 if artifact is None else self.store.local_path(artifact.digest).stat().st_size)

    def check_cancelled(self) -> None:
        """Return, or raise CancelledError when the job must stop. Call it every iteration."""
        if self._cancelled.is_set():
            raise CancelledError("the job was asked to stop")

    def load_checkpoint(self) -> artifacts_pb2.Artifact | None:
        """Return the artifact that `save_checkpoint` was last given for this job, in this or an earlier run."""
        data = self.store.get_ref(checkpoint_ref(self.job_id))
        return None if data is None else artifacts_pb2.Artifact.FromString(data)

    def save_checkpoint(self, artifact: artifacts_pb2.Artifact) -> None:
        """Make a stored artifact the one that a later run resumes from, in place of the last, at once."""
        self.store.set_ref(checkpoint_ref(self.job_id), artifact.SerializeToString())
