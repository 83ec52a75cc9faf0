"""What the coordinator needs of its workers; how they are reached is left to the implementation."""

from collections.abc import AsyncGenerator
from typing import Protocol

from granq.v1 import jobs_pb2
from services.coordinator.requests import JobCall


class RunningJobs(Protocol):
    """Jobs that were started, for those who end them.

    Every call raises the `GranqError` that the worker answered with; `UnavailableError` when it cannot be reached or
    does not answer in time.
    """

    async def get(self, worker: str, job_id: str) -> jobs_pb2.Job:
        """Return a job as it is now."""

    async def cancel(self, worker: str, job_id: str, timeout_seconds: float) -> jobs_pb2.Job:
        """Ask a job to end."""


class Workers(RunningJobs, Protocol):
    """The generator, the quantizer and the evaluator; errors are as those of RunningJobs."""

    async def start(self, call: JobCall) -> jobs_pb2.Job:
        """Start a job, attach to the one that runs, or resume one that failed."""

    def watch(
        self, worker: str, job_id: str, run_id: str, sequence: int
    ) -> AsyncGenerator[jobs_pb2.WatchJobResponse, None]:
        """Yield a job's events behind a number of a run; ends with the job, or earlier when the stream's time is up."""
