"""The ways to a job: on the device that it has, or at the configured evaluator."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Protocol

from granq.engines.machine import Gpu, Machine
from granq.v1 import evaluator_pb2, jobs_pb2
from services.common.errors import AbortedError, GranqError
from services.common.logs import get_logger
from services.coordinator.devices.links import DeviceLink
from services.coordinator.devices.table import DeviceRecord
from services.coordinator.requests import JobCall
from services.coordinator.workers import Workers

EVALUATOR = "evaluator"
_ASK_AGAIN_SECONDS = 30.0

log = get_logger(__name__)


class DeviceLostError(AbortedError):
    """A job's device has lost its lease; the job has ended there, and needs another device, or the same one again."""

    reason = "DEVICE_LOST"


class Reachable(Protocol):
    """What is needed of the pool."""

    async def find(self, job_id: str) -> DeviceRecord | None:
        """Return the device that a job has, if any."""

    def link(self, device: DeviceRecord) -> DeviceLink:
        """Return a device's link, or raise UnavailableError."""


class DeviceWorkers:
    """The device that one job has, as workers. They raise DeviceLostError once the job has it no longer.

    Args:
        pool: Knows the devices.
        device_id: The device.
    """

    def __init__(self, pool: Reachable, device_id: str) -> None:
        self._pool = pool
        self._device_id = device_id
        self._dialled: tuple[str, DeviceLink] | None = None

    async def start(self, call: JobCall) -> jobs_pb2.Job:
        """Start the job, attach to the one that runs, or resume one that failed."""
        return await (await self._link(call.job_id)).start(call.request)

    async def get(self, worker: str, job_id: str) -> jobs_pb2.Job:
        """Return the job as it is now."""
        return await (await self._link(job_id)).get(job_id)

    async def watch(
        self, worker: str, job_id: str, run_id: str, sequence: int
    ) -> AsyncGenerator[jobs_pb2.WatchJobResponse, None]:
        """Yield the job's events behind a number of a run."""
        async with aclosing((await self._link(job_id)).watch(job_id, run_id, sequence)) as events:
            async for event in events:
                yield event

    async def cancel(self, worker: str, job_id: str, timeout_seconds: float) -> jobs_pb2.Job:
        """Ask the job to end."""
        return await (await self._link(job_id)).cancel(job_id, timeout_seconds)

    async def _link(self, job_id: str) -> DeviceLink:
        device = await self._pool.find(job_id)
        if device is None or device.device_id != self._device_id or device.lapsed:
            raise DeviceLostError(f"device {self._device_id} has gone away with the job, which begins anew")
        address = device.info.address
        if self._dialled is not None and self._dialled[0] != address:
            await self.close()
        if self._dialled is None:
            link = self._pool.link(device)
            if not address:
                return link  # the device's own stream, which is not ours to close
            self._dialled = (address, link)
        return self._dialled[1]

    async def close(self) -> None:
        """Close the connection, if one was made to an address."""
        if self._dialled is not None:
            (_, link), self._dialled = self._dialled, None
            await link.close()


class ConfiguredWorkers(Workers, Protocol):
    """The workers at the configured addresses."""

    async def capabilities(self) -> evaluator_pb2.GetCapabilitiesResponse:
        """Return what the evaluator can run and build."""


class ConfiguredEvaluator:
    """The configured evaluator as the pool sees it: one more machine, which is never claimed.

    Args:
        workers: The configured workers.

    Attributes:
        workers: As given.
    """

    def __init__(self, workers: ConfiguredWorkers) -> None:
        self.workers = workers
        self._asked = -_ASK_AGAIN_SECONDS
        self._machine: Machine | None = None

    async def fits(self, lacks: Callable[[Machine], list[str]]) -> bool:
        """Return whether the evaluator is there and lacks nothing."""
        if time.monotonic() - self._asked >= _ASK_AGAIN_SECONDS:
            try:
                found = await self.workers.capabilities()
            except GranqError as error:
                log.info("the configured evaluator does not say what it can do", error=error.message)
                self._machine = None
            else:
                gpu = Gpu(found.gpu, found.compute_capability) if found.compute_capability else None
                versions: dict[int, str] = {runtime.runtime: runtime.version for runtime in found.runtimes}
                self._machine = Machine(found.platform, gpu, found.driver_version, versions)
            self._asked = time.monotonic()
        return self._machine is not None and not lacks(self._machine)


class PlacedJobs:
    """All jobs, each wherever it is, for those who end them.

    Args:
        pool: Knows the devices.
        configured: The workers at the configured addresses.
    """

    def __init__(self, pool: Reachable, configured: Workers) -> None:
        self._pool = pool
        self._configured = configured

    async def get(self, worker: str, job_id: str) -> jobs_pb2.Job:
        """Return a job as it is now."""
        async with self._at(worker, job_id) as workers:
            return await workers.get(worker, job_id)

    async def cancel(self, worker: str, job_id: str, timeout_seconds: float) -> jobs_pb2.Job:
        """Ask a job to end."""
        async with self._at(worker, job_id) as workers:
            return await workers.cancel(worker, job_id, timeout_seconds)

    @asynccontextmanager
    async def _at(self, worker: str, job_id: str) -> AsyncIterator[Workers]:
        device = await self._pool.find(job_id) if worker == EVALUATOR else None
        if device is None:
            yield self._configured
            return
        workers = DeviceWorkers(self._pool, device.device_id)
        try:
            yield workers
        finally:
            await workers.close()
