"""Runs one worker job to its end, whatever happens to the worker or the connection meanwhile."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from granq.v1 import common_pb2, jobs_pb2
from services.common.errors import (
    WORKER_BUSY,
    AbortedError,
    GranqError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    from_failure,
    to_failure,
)
from services.common.logs import get_logger
from services.coordinator.relay import ProgressRelay
from services.coordinator.requests import JobCall
from services.coordinator.transitions import JobCursor
from services.coordinator.workers import Workers

State = jobs_pb2.JobState
PROCESS_DIED = "JOB_PROCESS_DIED"
_UNAVAILABLE = 14
_FIRST_DELAY = 0.5
_LAST_DELAY = 10.0

log = get_logger(__name__)


@dataclass(frozen=True)
class Patience:
    """How much trouble a job may have.

    Attributes:
        unavailable_seconds: Longest time without an answer of the worker, or without a step while its jobs fail as
            unavailable.
        max_crashes: Deaths of the job's process, one after the other without a step of progress, that end the job.
    """

    unavailable_seconds: float
    max_crashes: int


class JobRunner:
    """Starts a job, follows it, and starts it again when the worker or its process went away.

    Args:
        workers: The workers.
        call: The job.
        patience: Limits of the retries.
        relay: Takes the progress.
        announce: Called with the cause when an attempt is going to be repeated.
        check: Called before an attempt is repeated; raises when the job is no longer wanted.
        cursor: How far the job's events were read by an earlier process.
    """

    def __init__(
        self,
        workers: Workers,
        call: JobCall,
        patience: Patience,
        relay: ProgressRelay,
        announce: Callable[[common_pb2.Failure], Awaitable[None]],
        check: Callable[[], Awaitable[None]],
        cursor: JobCursor,
    ) -> None:
        self._workers = workers
        self._call = call
        self._patience = patience
        self._relay = relay
        self._announce = announce
        self._check = check
        self._cursor = cursor
        self._crashes = 0
        self._delay = _FIRST_DELAY
        self._furthest: dict[str, int] = {}
        self._last_answer = self._last_step = time.monotonic()
        self._told = ""

    async def run(self) -> jobs_pb2.JobResult:
        """Return the job's result.

        Raises:
            GranqError: The job failed, was cancelled at the worker (AbortedError), or the worker stayed away too long.
                A worker that is busy is asked again, for as long as it takes.
        """
        while True:
            try:
                job = await self._follow(await self._workers.start(self._call))
            except UnavailableError as error:
                await self._bear(error, time.monotonic() - self._last_answer)
                continue
            except ResourceExhaustedError as error:
                if error.reason != WORKER_BUSY:
                    raise
                self._answered()
                await self._bear(error, 0.0)
                continue
            if job.state == State.JOB_STATE_SUCCEEDED:
                return job.result
            if job.state == State.JOB_STATE_CANCELLED:
                raise AbortedError(
                    f"job {self._call.job_id} was cancelled at the {self._call.worker}; retry the pipeline to resume",
                    reason="JOB_CANCELLED",
                )
            await self._bear_failure(job.failure)

    async def _follow(self, job: jobs_pb2.Job) -> jobs_pb2.Job:
        while True:
            self._answered()
            if job.state not in (State.JOB_STATE_QUEUED, State.JOB_STATE_RUNNING):
                return job
            try:
                watch = self._workers.watch(
                    self._call.worker, self._call.job_id, self._cursor.run_id, self._cursor.sequence
                )
                async with aclosing(watch) as events:
                    async for event in events:
                        self._answered()
                        await self._take(event)
                        job = event.job
                # The stream may have ended with the job, or because its time was up.
                job = await self._workers.get(self._call.worker, self._call.job_id)
            except NotFoundError as error:
                # The worker was restarted and has forgotten its jobs; their checkpoints it still has.
                raise UnavailableError(f"the {self._call.worker} was restarted", reason="WORKER_RESTARTED") from error

    async def _take(self, event: jobs_pb2.WatchJobResponse) -> None:
        self._cursor = JobCursor(event.run_id, event.sequence)
        if not event.job.HasField("progress"):
            return
        progress = event.job.progress
        # A resumed run repeats the steps since its checkpoint; only one beyond all that were seen counts as getting on.
        if progress.step > self._furthest.get(progress.phase, -1):
            self._furthest[progress.phase] = progress.step
            self._last_step = time.monotonic()
            self._crashes, self._told, self._delay = 0, "", _FIRST_DELAY
        await self._relay.add(progress, self._cursor)

    def _answered(self) -> None:
        self._last_answer = time.monotonic()

    async def _bear_failure(self, failure: common_pb2.Failure) -> None:
        if failure.code != _UNAVAILABLE:
            raise from_failure(failure)
        if failure.reason == PROCESS_DIED:
            self._crashes += 1
            if self._crashes >= self._patience.max_crashes:
                raise UnavailableError(
                    f"the job's process died {self._crashes} times without a step of progress: {failure.message}",
                    reason=failure.reason,
                )
            self._told = ""  # every death is worth an event
        await self._bear(from_failure(failure), time.monotonic() - self._last_step)

    async def _bear(self, error: GranqError, away_seconds: float) -> None:
        if away_seconds > self._patience.unavailable_seconds:
            raise UnavailableError(
                f"the {self._call.worker} gave no progress for {away_seconds:.0f} s: {error.message}",
                reason=error.reason,
            ) from error
        cause = to_failure(error)
        if cause.reason != self._told:  # one event per outage, not one per attempt
            self._told = cause.reason
            log.warning(
                "job interrupted; trying again", worker=self._call.worker, job_id=self._call.job_id, cause=cause
            )
            await self._announce(cause)
        await asyncio.sleep(self._delay * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)
        self._delay = min(2 * self._delay, _LAST_DELAY)
        await self._check()
