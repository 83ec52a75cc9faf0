"""Runs the jobs of pipelines: gives each its place, follows it there, and notes it as long as it may run."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

from granq.v1 import common_pb2, jobs_pb2
from services.common.errors import GranqError, NotFoundError, UnavailableError, to_failure
from services.common.logs import get_logger
from services.common.slots import Slots
from services.coordinator.calls import DatabaseCalls
from services.coordinator.devices.pool import Placement, Wait
from services.coordinator.devices.reach import DeviceLostError
from services.coordinator.metrics import JOB_RETRIES, reason_label
from services.coordinator.relay import ProgressRelay
from services.coordinator.repository import Repository
from services.coordinator.requests import JobCall
from services.coordinator.runner import JobRunner, Patience
from services.coordinator.transitions import JobCursor, Transitions
from services.coordinator.workers import RunningJobs, Workers

_STOP_SECONDS = 2.0

log = get_logger(__name__)


class Places(Protocol):
    """Where jobs run; the pool of devices."""

    async def acquire(self, call: JobCall, pipeline_id: str, wait: Wait) -> Placement:
        """Return where a job is to run, as soon as there is such a place."""

    async def release(self, job_id: str) -> None:
        """Free the device of a job that has ended."""


class PipelineJobs:
    """Jobs as the stages see them: they take long, and end with a result or an error.

    Args:
        repository: Notes the jobs.
        transitions: Note what happens to them.
        calls: Run calls of the database.
        places: Where jobs run.
        running: Ends them.
        patience: Limits of retries.
        pools: Jobs that may be at each configured worker at once; at one that is not listed, as many as come.
    """

    def __init__(
        self,
        *,
        repository: Repository,
        transitions: Transitions,
        calls: DatabaseCalls,
        places: Places,
        running: RunningJobs,
        patience: Patience,
        pools: Mapping[str, int],
    ) -> None:
        self._repository = repository
        self._transitions = transitions
        self._calls = calls
        self._places = places
        self._running = running
        self._patience = patience
        self._pools = {worker: Slots(count) for worker, count in pools.items()}

    async def run(self, pipeline_id: str, attempt: int, call: JobCall, alone: asyncio.Lock) -> jobs_pb2.JobResult:
        """Return a job's result, wherever it ran; a job whose device is lost begins anew on another.

        Args:
            pipeline_id: The pipeline.
            attempt: Its attempt, which must still drive it.
            call: The job.
            alone: Held while the job runs at a configured worker. Its machine may be the one of the stage's other jobs,
                and each would falsify the other's times; a device has one job at a time anyway.

        Raises:
            GranqError: It failed, or no place was found for it.
            SupersededError: The attempt lost the pipeline.
        """

        async def wait(what: str) -> None:
            phase = f"{call.label}: {what}" if call.label else what
            progress = jobs_pb2.Progress(phase=phase)
            await self._calls.insist(
                self._transitions.record_progress, pipeline_id, attempt, progress, call.job_id, JobCursor()
            )

        while True:
            try:
                placement = await self._places.acquire(call, pipeline_id, wait)
            except GranqError:
                await self._forget(pipeline_id, call, on_device=True)
                raise
            try:
                if placement.device_id:
                    return await self._run_at(pipeline_id, attempt, call, placement)
                async with alone, self._slot(pipeline_id, call):
                    return await self._run_at(pipeline_id, attempt, call, placement)
            except DeviceLostError as error:
                # Its claim stays until another device takes the job, so that nobody takes the job for one without.
                await self._announce(pipeline_id, attempt, call, to_failure(error))

    @asynccontextmanager
    async def _slot(self, pipeline_id: str, call: JobCall) -> AsyncIterator[None]:
        pool = self._pools.get(call.worker)
        if pool is None:
            yield
            return
        async with pool.hold(await self._calls.insist(self._repository.place, pipeline_id)):
            yield

    async def _run_at(self, pipeline_id: str, attempt: int, call: JobCall, placement: Placement) -> jobs_pb2.JobResult:
        on_device = bool(placement.device_id)
        try:
            result = await self._follow(pipeline_id, attempt, call, placement.workers)
        except (UnavailableError, DeviceLostError):
            raise  # the job may still run, or run again
        except GranqError as error:
            await self._forget(pipeline_id, call, on_device=on_device)
            if placement.instead and error.reason:
                raise type(error)(
                    f"{error.message}; {placement.instead}", reason=error.reason, field=error.field
                ) from error
            raise
        finally:
            await placement.close()
        await self._forget(pipeline_id, call, on_device=on_device)
        return result

    async def _follow(self, pipeline_id: str, attempt: int, call: JobCall, workers: Workers) -> jobs_pb2.JobResult:
        async def write(progress: jobs_pb2.Progress, cursor: JobCursor) -> None:
            await self._calls.insist(
                self._transitions.record_progress, pipeline_id, attempt, progress, call.job_id, cursor
            )

        async def announce(cause: common_pb2.Failure) -> None:
            await self._announce(pipeline_id, attempt, call, cause)

        async def check() -> None:
            await self._calls.insist(self._transitions.check_owned, pipeline_id, attempt)

        cursor = await self._calls.insist(self._repository.open_job, pipeline_id, call.job_id, call.worker)
        async with ProgressRelay(write, call.label) as relay:
            return await JobRunner(workers, call, self._patience, relay, announce, check, cursor).run()

    async def _announce(self, pipeline_id: str, attempt: int, call: JobCall, cause: common_pb2.Failure) -> None:
        JOB_RETRIES.labels(call.worker, reason_label(cause.reason)).inc()
        await self._calls.insist(self._transitions.record_trouble, pipeline_id, attempt, cause)

    async def _forget(self, pipeline_id: str, call: JobCall, *, on_device: bool) -> None:
        # In this order: an open job without a device counts as one at the configured evaluator.
        await self._calls.insist(self._repository.close_job, pipeline_id, call.job_id)
        if on_device:
            await self._places.release(call.job_id)

    async def stop(self, pipeline_id: str) -> None:
        """Ask the jobs of a failed pipeline that may still run to end; the sweeper tells workers that are away now."""
        for job in await self._calls.insist(self._repository.open_jobs, pipeline_id):
            try:
                await self._running.cancel(job.worker, job.job_id, _STOP_SECONDS)
            except NotFoundError:
                pass  # the worker was restarted and has forgotten it: nothing runs
            except GranqError as error:
                log.info("job not cancelled", job_id=job.job_id, error=error.message)
                continue
            await self._calls.insist(self._repository.close_job, pipeline_id, job.job_id)
