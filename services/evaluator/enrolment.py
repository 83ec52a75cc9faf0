"""Keeps this device in the coordinator's pool, and its jobs within the lease that it has there."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

from granq.v1 import devices_pb2
from services.common.errors import GranqError, NotFoundError, UnavailableError
from services.common.logs import get_logger
from services.evaluator.identity import Identity
from services.evaluator.metrics import DEVICE_REGISTERED

_FIRST_DELAY = 0.5
_LAST_DELAY = 15.0

log = get_logger(__name__)


def now() -> float:
    """Return a time in seconds that also goes on while the machine sleeps, as the coordinator's does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Coordinator(Protocol):
    """What is asked of the coordinator; calls raise GranqError."""

    async def register(self, request: devices_pb2.RegisterDeviceRequest) -> devices_pb2.RegisterDeviceResponse:
        """Enter the pool."""

    async def renew(self, device_id: str, instance_id: str) -> None:
        """Send a heartbeat."""

    async def leave(self, device_id: str, instance_id: str) -> None:
        """Say goodbye."""


class Enrolment:
    """Registers, sends heartbeats, and begins anew whenever the coordinator was away.

    Once the lease has ended the device's jobs are ended, too: the coordinator then starts them elsewhere.

    Args:
        coordinator: The coordinator.
        identity: Who this device is.
        info: What it is and can do.
        interrupt: Ends all jobs at once as failed with an error; returns when they have ended.
        serve: Serves calls over a stream to the coordinator, until that ends; None where the coordinator dials.
        report: Told whether the device is in the pool, whenever that changes.
    """

    def __init__(
        self,
        *,
        coordinator: Coordinator,
        identity: Identity,
        info: devices_pb2.DeviceInfo,
        interrupt: Callable[[GranqError], Awaitable[None]],
        serve: Callable[[], Awaitable[None]] | None,
        report: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._coordinator = coordinator
        self._identity = identity
        self._info = info
        self._interrupt = interrupt
        self._serve = serve
        self._report = report
        self._heartbeat_seconds = self._lease_seconds = 0.0
        self._lease_end: float | None = None
        self._renewed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin, in the background."""
        self._tasks = [asyncio.create_task(self._enrol()), asyncio.create_task(self._guard())]

    async def stop(self) -> None:
        """Send no more heartbeats and take no more calls; the lease is still held."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._tell(registered=False)

    async def say_goodbye(self) -> None:
        """End the lease, once no job runs any longer."""
        if self._lease_end is None:
            return
        try:
            await self._coordinator.leave(self._identity.device_id, self._identity.instance_id)
        except GranqError as error:
            log.warning("not deregistered; the lease ends by itself", error=error.message)

    async def _enrol(self) -> None:
        delay, told = _FIRST_DELAY, ""
        while True:
            try:
                await self._register()
                delay, told = _FIRST_DELAY, ""
                await self._stay()
            except GranqError as error:
                if error.reason != told:
                    told = error.reason
                    log.warning("not in the pool; trying again", reason=error.reason, error=error.message)
                await self._tell(registered=False)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)
            delay = min(2 * delay, _LAST_DELAY)

    async def _register(self) -> None:
        await self._keep_lease()
        asked = now()
        terms = await self._coordinator.register(
            devices_pb2.RegisterDeviceRequest(
                info=self._info,
                instance_id=self._identity.instance_id,
                replaces_instance_id=self._identity.previous,
            )
        )
        self._heartbeat_seconds, self._lease_seconds = terms.heartbeat_seconds, terms.lease_seconds
        self._renew(asked)
        with suppress(OSError):  # else the next process waits for the end of this one's lease
            await asyncio.to_thread(self._identity.remember)
        log.info("registered", device_id=self._identity.device_id, lease_seconds=terms.lease_seconds)
        await self._tell(registered=True)

    async def _stay(self) -> None:
        """Send heartbeats and serve calls for as long as the coordinator knows this instance."""
        tasks = {asyncio.create_task(self._send_heartbeats())}
        if self._serve is not None:
            tasks.add(asyncio.create_task(self._serve_on(self._serve)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_heartbeats(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(self._heartbeat_seconds / 3 if failing else self._heartbeat_seconds)
            await self._keep_lease()
            sent = now()
            try:
                await self._coordinator.renew(self._identity.device_id, self._identity.instance_id)
            except UnavailableError as error:
                if not failing:
                    log.warning("heartbeat not answered; trying again", error=error.message)
                failing = True
            except NotFoundError:
                # Another instance has the name by now, or the coordinator has another database.
                await self._end_jobs("the coordinator does not know this device any longer")
                raise
            else:
                failing = False
                self._renew(sent)

    async def _serve_on(self, serve: Callable[[], Awaitable[None]]) -> None:
        delay = _FIRST_DELAY
        while True:
            began = now()
            try:
                await serve()
            except UnavailableError as error:
                log.warning("the stream to the coordinator broke; opening it again", error=error.message)
            delay = _FIRST_DELAY if now() - began > _LAST_DELAY else min(2 * delay, _LAST_DELAY)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)

    def _renew(self, sent: float) -> None:
        # From its sending: the coordinator counts from the receipt, which cannot be earlier.
        self._lease_end = sent + self._lease_seconds
        self._renewed.set()

    async def _guard(self) -> None:
        """Have the jobs end with the lease."""
        while True:
            self._renewed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if self._lease_end is None else max(0.0, self._lease_end - now())):
                    await self._renewed.wait()
                    continue
            await self._keep_lease()
            await self._renewed.wait()

    async def _keep_lease(self) -> None:
        """End the jobs if the lease has ended; also where this process was held up, and comes to it only now."""
        if self._lease_end is not None and now() >= self._lease_end:
            await self._end_jobs(f"the coordinator gave no answer for {self._lease_seconds:g} s")
            await self._tell(registered=False)

    async def _end_jobs(self, why: str) -> None:
        await self._interrupt(UnavailableError(f"{why}; the job ends, to begin anew", reason="LEASE_ENDED"))

    async def _tell(self, *, registered: bool) -> None:
        DEVICE_REGISTERED.set(registered)
        await self._report(registered)
