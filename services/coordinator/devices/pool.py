"""The pool at work: it gives each job a device, or says what the job waits for.

A job waits while devices that would do are busy or away. It goes to the evaluator that is configured when that fits and
no device is free, or when no device will ever do; what that one says of it then counts.
"""

import asyncio
import time
from bisect import insort
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from granq.v1 import devices_pb2, jobs_pb2
from services.common.errors import FailedPreconditionError, GranqError, NotFoundError, UnavailableError
from services.common.logs import get_logger
from services.coordinator.calls import DatabaseCalls
from services.coordinator.devices.links import DeviceLink, StreamLink
from services.coordinator.devices.needs import Need, need_of
from services.coordinator.devices.presence import State, describe, state_of
from services.coordinator.devices.reach import EVALUATOR, ConfiguredEvaluator, DeviceWorkers
from services.coordinator.devices.streams import Streams
from services.coordinator.devices.table import DeviceRecord, DeviceTable, Place, not_registered
from services.coordinator.requests import JobCall
from services.coordinator.workers import Workers

_JOB_ENDED = (jobs_pb2.JOB_STATE_SUCCEEDED, jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED)

Wait = Callable[[str], Awaitable[None]]
"""Told what a job waits for, whenever that changes."""

log = get_logger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where a job is to run.

    Attributes:
        workers: How it is reached there.
        device_id: The device; empty for the configured evaluator.
        instead: Why no device has it, where there are devices; else empty.
    """

    workers: Workers
    device_id: str = ""
    instead: str = ""

    async def close(self) -> None:
        """End the connection to the device, once the job is not followed any longer."""
        if isinstance(self.workers, DeviceWorkers):
            await self.workers.close()


@dataclass(eq=False)
class _Waiter:
    need: Need
    priority: int
    away_since: float | None = field(default=None)


class DevicePool:
    """The devices of one coordinator; other coordinators on its database see the same ones.

    Args:
        table: The stored pool.
        calls: Run its calls.
        evaluator: The evaluator that is configured.
        dial: Makes the link to a device with an address.
        patience_seconds: How long a job waits while all devices that would do are away.
        poll_seconds: Time between looks for what other coordinators, and time itself, have changed.
    """

    def __init__(
        self,
        *,
        table: DeviceTable,
        calls: DatabaseCalls,
        evaluator: ConfiguredEvaluator,
        dial: Callable[[str, str], DeviceLink],
        patience_seconds: float,
        poll_seconds: float,
    ) -> None:
        self._table = table
        self._calls = calls
        self._evaluator = evaluator
        self._dial = dial
        self._patience_seconds = patience_seconds
        self._poll_seconds = poll_seconds
        self._devices: tuple[DeviceRecord, ...] = ()
        self._streams = Streams()
        self._waiters: list[_Waiter] = []
        self._moved = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the pool, then look after it in the background."""
        await self.refresh()
        self._task = asyncio.create_task(self._look_after())

    async def refresh(self) -> Sequence[DeviceRecord]:
        """Read the pool anew and return it."""
        self._devices = tuple(await self._calls.insist(self._table.all))
        return self._devices

    async def changed(self) -> None:
        """Read the pool anew, and have those who wait look at it."""
        await self.refresh()
        self._wake()

    def state(self, device: DeviceRecord) -> tuple[State, str]:
        """Return a device's state, and a sentence about it."""
        return state_of(device, self._table.terms, streams=self._streams.of(device) is not None)

    def counts(self) -> tuple[Counter[int], Counter[str]]:
        """Return how many devices are in each state, and how many jobs wait for one by target; for any thread."""
        states = Counter(int(self.state(device)[0]) for device in self._devices)
        return states, Counter(waiter.need.target for waiter in tuple(self._waiters))

    async def acquire(self, call: JobCall, pipeline_id: str, wait: Wait) -> Placement:
        """Return where a job is to run, as soon as there is such a place; a job that has one keeps it.

        Raises:
            FailedPreconditionError: Every device that would do has been away for too long.
        """
        need = need_of(call)
        if need is None or not self._devices:
            return Placement(self._evaluator.workers)
        if await self._calls.insist(self._table.place, pipeline_id, call.job_id) is Place.EVALUATOR:
            return Placement(self._evaluator.workers)
        waiter, told = _Waiter(need, call.request.key.priority), ""
        insort(self._waiters, waiter, key=lambda other: -other.priority)
        try:
            while True:
                self._moved = self._moved if not self._moved.is_set() else asyncio.Event()
                moved = self._moved
                placement = await self._try(waiter, call, pipeline_id)
                if placement is not None:
                    return placement
                text = self._waits_for(waiter)
                if text != told:
                    await wait(text)
                    told = text
                await self._next_look(moved)
        finally:
            self._waiters.remove(waiter)
            self._wake()

    async def _try(self, waiter: _Waiter, call: JobCall, pipeline_id: str) -> Placement | None:
        devices = await self.refresh()
        held = next((device for device in devices if device.job_id == call.job_id), None)
        if held is not None and not held.lapsed:
            return self._on(held)
        fitting = self._fitting(waiter)
        chosen = self._plan().get(waiter)
        if chosen is not None:
            instance = chosen.instance_id
            if await self._calls.insist(self._table.claim, chosen.device_id, instance, pipeline_id, call.job_id):
                log.info("job gets a device", device_id=chosen.device_id, job_id=call.job_id, pipeline_id=pipeline_id)
                return self._on(chosen)
        elif not fitting or await self._evaluator.fits(waiter.need.lacks):
            if held is not None:
                await self.release(call.job_id)
            return Placement(self._evaluator.workers, instead="" if fitting else self._all_unmet(waiter.need))
        self._check_patience(waiter, fitting)
        return None

    def _fitting(self, waiter: _Waiter) -> list[DeviceRecord]:
        return [device for device in self._devices if not waiter.need.unmet(device.info)]

    def _plan(self) -> dict[_Waiter, DeviceRecord]:
        """Return who gets which of the free devices, by priority; among equals, whoever waits longest chooses first."""
        free = {d.device_id: d for d in self._devices if self.state(d)[0] == State.DEVICE_STATE_READY}
        plan: dict[_Waiter, DeviceRecord] = {}
        for waiter in self._waiters:
            first = next((d for d in free.values() if not waiter.need.unmet(d.info)), None)
            if first is not None:
                plan[waiter] = free.pop(first.device_id)
        return plan

    def _check_patience(self, waiter: _Waiter, fitting: list[DeviceRecord]) -> None:
        if any(self.state(device)[0] != State.DEVICE_STATE_AWAY for device in fitting):
            waiter.away_since = None
            return
        now = time.monotonic()
        waiter.away_since = waiter.away_since if waiter.away_since is not None else now
        if now - waiter.away_since > self._patience_seconds:
            raise FailedPreconditionError(
                f"{waiter.need.what} needs a device, and none that will do was there for "
                f"{self._patience_seconds:.0f} s: {self._list(fitting)}; {self._all_unmet(waiter.need)}".removesuffix(
                    "; "
                ),
                reason="DEVICE_AWAY",
            )

    def _waits_for(self, waiter: _Waiter) -> str:
        fitting = self._fitting(waiter)
        mine = {device.device_id for device in fitting}
        earlier = self._waiters[: self._waiters.index(waiter)]
        ahead = sum(any(device.device_id in mine for device in self._fitting(other)) for other in earlier)
        queue = f"; place {ahead + 1} in the queue" if ahead else ""
        return f"waits for a device: {self._list(fitting)}{queue}"

    def _list(self, devices: list[DeviceRecord]) -> str:
        return ", ".join(f"{device.device_id} ({self.state(device)[1] or 'free'})" for device in devices)

    def _all_unmet(self, need: Need) -> str:
        reasons = ((device, need.unmet(device.info)) for device in self._devices)
        return "; ".join(f"device {device.device_id}: {', '.join(why)}" for device, why in reasons if why)

    def _on(self, device: DeviceRecord) -> Placement:
        return Placement(DeviceWorkers(self, device.device_id), device.device_id)

    async def _next_look(self, moved: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(self._poll_seconds):
                await moved.wait()
        except TimeoutError:
            return

    def _wake(self) -> None:
        self._moved.set()

    async def release(self, job_id: str) -> None:
        """Free the device of a job that has ended."""
        await self._calls.insist(self._table.release, job_id)
        self._wake()

    async def find(self, job_id: str) -> DeviceRecord | None:
        """Return the device that a job has, if any."""
        return await self._calls.call(self._table.find, job_id) if self._devices else None

    def link(self, device: DeviceRecord) -> DeviceLink:
        """Return a device's link: a new one to its address, or its stream.

        Raises:
            UnavailableError: It has no address, and no stream is open.
        """
        if device.info.address:
            return self._dial(device.device_id, device.info.address)
        stream = self._streams.of(device)
        if stream is None:
            raise UnavailableError(f"device {device.device_id} is not connected now", reason="DEVICE_NOT_CONNECTED")
        return stream

    async def attach(self, stream: StreamLink) -> None:
        """Make a stream the way to its device, in place of an earlier one.

        Raises:
            NotFoundError: The stream's instance is not registered.
        """
        devices = {device.device_id: device for device in await self.refresh()}
        known = devices.get(stream.device_id)
        if known is None or known.instance_id != stream.instance_id or known.lapsed:
            raise not_registered(stream.device_id)
        await self._streams.add(stream)
        self._wake()

    async def detach(self, stream: StreamLink) -> None:
        """Forget a stream that has ended."""
        await self._streams.end(stream)
        self._wake()

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self._streams.keep(await self.refresh())
                for device in await self._calls.call(self._table.unwanted):
                    await self._release_ended(device)
            except Exception:
                log.exception("looking after the devices failed; it is repeated")

    async def _release_ended(self, device: DeviceRecord) -> None:
        """Free a device whose job nobody wants any longer, once the job is known to have ended."""
        if not device.lapsed:
            workers = DeviceWorkers(self, device.device_id)
            try:
                if (await workers.get(EVALUATOR, device.job_id)).state not in _JOB_ENDED:
                    return
            except NotFoundError:
                pass  # never started, or forgotten by a restarted evaluator: nothing runs
            except GranqError as error:
                log.info("device not freed yet", device_id=device.device_id, error=error.message)
                return
            finally:
                await workers.close()
        if await self._calls.call(self._table.release_unwanted, device.job_id, device.pipeline_id):
            await self.changed()

    async def close(self) -> None:
        """End all streams, and stop looking after the pool."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._streams.close()

    def describe(self, device: DeviceRecord) -> devices_pb2.Device:
        """Return a device for a user."""
        return describe(device, *self.state(device))
