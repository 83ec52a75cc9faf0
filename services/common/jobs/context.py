"""What a job function is given."""

import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, SupportsFloat, TypeVar

import structlog
from pydantic import BaseModel

from granq.v1 import artifacts_pb2, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import CancelledError, DataLossError, GranqError, InvalidArgumentError, NotFoundError
from services.common.jobs.reading import Reading, reading_of
from services.common.settings import ServerSettings
from services.common.tracing import Phases

_Item = TypeVar("_Item")

REPORT_SECONDS = 0.2
"""Least time between two reports of one phase."""


def checkpoint_ref(job_id: str) -> str:
    """Return the name under which the store holds a job's latest checkpoint."""
    return f"jobs/{job_id}/checkpoint"


class CheckpointRecord(BaseModel):
    """What the store keeps under that name.

    Attributes:
        form: Form of the file.
        artifact: granq.v1.Artifact of the file, in base 64.
        needs: Digests of the file and of what it refers to. What the store keeps is found by looking for digests.
    """

    form: str
    artifact: str
    needs: list[str]

    def read(self) -> artifacts_pb2.Artifact:
        """Return the file's artifact."""
        return artifacts_pb2.Artifact.FromString(base64.b64decode(self.artifact))


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
        check_lease: Raises when another process runs the job now.
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
        check_lease: Callable[[], None] = lambda: None,
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
        self._check_lease = check_lease
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
            DataLossError: The stored bytes do not match its digest.
            ResourceExhaustedError: Within the block: READ_MEMORY when the file needs more memory than it may have.
        """
        return self.limits(field, 0) if artifact is None else reading_of(self.limits, self.store, field, artifact)

    def reading_each(self, field: str, items: Iterator[_Item], size_bytes: int) -> Iterator[_Item]:
        """Yield what an iterator reads from a file that is not this software's own, each item under the limits.

        The limits are for one item, since nobody can say how long a whole set may take; what is done with an item is
        not bounded by them.

        Args:
            field: Field of the request that names the file.
            items: Reads one item whenever it is asked for the next.
            size_bytes: Memory that an item takes.

        Raises:
            ResourceExhaustedError: READ_MEMORY when an item needs more memory than it may have.
        """
        while True:
            with self.limits(field, size_bytes):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def check_cancelled(self) -> None:
        """Return, or raise CancelledError when the job must stop. Call it every iteration."""
        if self._cancelled.is_set():
            raise CancelledError("the job was asked to stop")
        self._check_lease()

    def load_checkpoint(self, form: str = "") -> artifacts_pb2.Artifact | None:
        """Return the artifact that `save_checkpoint` was last given for this job, in this or an earlier run.

        A checkpoint that cannot be used does not fail the job for ever: it is left out, which the log and the job's
        progress tell, and the work begins anew. That is one of another form, and one whose files are gone or damaged.

        Args:
            form: Name of the form of checkpoints that the job's code reads and writes; changes when that does.
        """
        data = self.store.get_ref(checkpoint_ref(self.job_id))
        if data is None:
            return None
        try:
            record = CheckpointRecord.model_validate_json(data)
            if record.form != form:
                raise InvalidArgumentError(f"it has the form {record.form!r}, and this version needs {form!r}")
            artifact = record.read()
            for digest in record.needs:
                self.store.stat(digest)
            self.store.local_path(artifact.digest)
        except (ValueError, InvalidArgumentError, NotFoundError, DataLossError) as error:
            why = error.message if isinstance(error, GranqError) else "it was written by another version"
            self.log.warning("the checkpoint cannot be used; the job begins anew", why=why)
            self.report(f"beginning anew without the last checkpoint: {why}")
            return None
        return artifact

    def save_checkpoint(self, artifact: artifacts_pb2.Artifact, form: str = "", needs: tuple[str, ...] = ()) -> None:
        """Make a stored artifact the one that a later run resumes from, in place of the last, at once.

        Args:
            artifact: The checkpoint.
            form: As for `load_checkpoint`.
            needs: Digests of other artifacts that it refers to, which are kept as long as it is.
        """
        encoded = base64.b64encode(artifact.SerializeToString()).decode()
        record = CheckpointRecord(form=form, artifact=encoded, needs=[artifact.digest, *needs])
        self.store.set_ref(checkpoint_ref(self.job_id), record.model_dump_json().encode())

    def drop_checkpoint(self, why: str) -> None:
        """Have the next run begin anew."""
        self.log.warning("checkpoint dropped", why=why)
        self.store.delete_ref(checkpoint_ref(self.job_id))
