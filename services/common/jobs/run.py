"""One run of a job: its state and its numbered events."""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from granq.v1 import jobs_pb2
from services.common.errors import CancelledError, GranqError, to_failure
from services.common.jobs.process import JobProcess

MAX_EVENTS = 512
"""Events that a run keeps for those who come later; at the reporting rate, some two minutes or more."""

ENDED = (jobs_pb2.JOB_STATE_SUCCEEDED, jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED)


class Run:
    """A job from its acceptance to its end. Used from one event loop.

    Args:
        kind: Kind of the job.
        key: The job and its pipeline.
        digest: Digest of kind and request.
    """

    def __init__(self, kind: str, key: jobs_pb2.JobKey, digest: str) -> None:
        self.kind = kind
        self.digest = digest
        self.cancelling = False
        self._job = jobs_pb2.Job(key=key, kind=kind, run_id=uuid.uuid4().hex, state=jobs_pb2.JOB_STATE_QUEUED)
        self._job.create_time.GetCurrentTime()
        self._events: deque[jobs_pb2.WatchJobResponse] = deque(maxlen=MAX_EVENTS)
        self._sequence = 0
        self._changed = asyncio.Event()
        self._closed = False
        self._emit()

    @classmethod
    def finished(cls, job: jobs_pb2.Job, digest: str) -> "Run":
        """Return the run of a job that ended under an earlier server, with one event: its end."""
        run = cls(job.kind, job.key, digest)
        run._job = job
        run._events.clear()
        run._sequence = 0
        run._emit()
        return run

    @property
    def job_id(self) -> str:
        """Id of the job."""
        return self._job.key.job_id

    @property
    def key(self) -> jobs_pb2.JobKey:
        """Key of the job."""
        return self._job.key

    @property
    def created_ns(self) -> int:
        """When it was accepted, in nanoseconds since 1970."""
        return self._job.create_time.ToNanoseconds()

    @property
    def run_id(self) -> str:
        """Id of this run."""
        return self._job.run_id

    @property
    def queued(self) -> bool:
        """Whether it waits for a free slot."""
        return self._job.state == jobs_pb2.JOB_STATE_QUEUED

    @property
    def restartable(self) -> bool:
        """Whether a repeated start begins a new run: it ended without a result."""
        return self._job.state in (jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED)

    @property
    def outcome(self) -> str:
        """The end in a word for metrics and logs: succeeded, failed, cancelled, or interrupted by the server's end."""
        name = jobs_pb2.JobState.Name(self._job.state).removeprefix("JOB_STATE_").lower()
        return name if self.ended else "interrupted"

    @property
    def ended(self) -> bool:
        """Whether the run has a final state."""
        return self._job.state in ENDED

    def snapshot(self) -> jobs_pb2.Job:
        """Return the job as it is now; later changes do not show in it."""
        copy = jobs_pb2.Job()
        copy.CopyFrom(self._job)
        return copy

    def begin(self) -> None:
        """Note that the process runs."""
        self._job.state = jobs_pb2.JOB_STATE_RUNNING
        self._emit()

    def progress(self, progress: jobs_pb2.Progress) -> None:
        """Note how far it is."""
        self._job.progress.CopyFrom(progress)
        self._emit()

    def as_succeeded(self, result: jobs_pb2.JobResult) -> jobs_pb2.Job:
        """Return the job as it will be after `succeed`."""
        job = self.snapshot()
        job.state = jobs_pb2.JOB_STATE_SUCCEEDED
        job.result.CopyFrom(result)
        job.end_time.GetCurrentTime()
        return job

    def succeed(self, job: jobs_pb2.Job) -> None:
        """Note the success that `as_succeeded` returned."""
        self._job = job
        self._emit()

    def fail(self, error: BaseException) -> None:
        """Note that it failed, or that it was cancelled."""
        if isinstance(error, CancelledError):
            self._job.state = jobs_pb2.JOB_STATE_CANCELLED
        else:
            self._job.state = jobs_pb2.JOB_STATE_FAILED
            self._job.failure.CopyFrom(to_failure(error))
        self._job.end_time.GetCurrentTime()
        self._emit()

    def close(self) -> None:
        """End all watches, because the server ends; the state stays what it is."""
        self._closed = True
        self._wake()

    def _emit(self) -> None:
        self._sequence += 1
        event = jobs_pb2.WatchJobResponse(run_id=self._job.run_id, sequence=self._sequence, job=self._job)
        event.time.GetCurrentTime()
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        # Whoever waits holds the old event; whoever comes later waits for the next one.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def watch(
        self, after_sequence: int, run_id: str, closed: GranqError
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        """Yield the events after a number, as they come, until the run has ended.

        Args:
            after_sequence: Number of the last event that is already known.
            run_id: Run that the number counts in; another run's number means nothing here, and all events are sent.
            closed: Raised when the server ends before the run does.
        """
        position = after_sequence if run_id in ("", self._job.run_id) else 0
        while True:
            changed = self._changed
            # Numbers have no gaps, so a number is a place in the ring; what fell out of it is skipped.
            for event in list(self._events)[max(0, position + 1 - self._events[0].sequence) :]:
                yield event
                position = event.sequence
            if changed.is_set():
                continue  # More came while the above were sent.
            if self.ended:
                return
            if self._closed:
                raise closed
            await changed.wait()


@dataclass
class ActiveRun:
    """What belongs to a run that has not ended."""

    task: asyncio.Task[None] | None = None
    process: JobProcess | None = None
    leave_queue: asyncio.Event = field(default_factory=asyncio.Event)
    interruption: GranqError | None = None
