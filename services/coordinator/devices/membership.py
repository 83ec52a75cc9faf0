"""Who is in the pool: what devices and users may do with it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from granq.v1 import devices_pb2
from services.common.errors import UnavailableError
from services.common.logs import get_logger
from services.coordinator.calls import DatabaseCalls
from services.coordinator.devices.links import StreamLink
from services.coordinator.devices.pool import DevicePool
from services.coordinator.devices.table import DeviceTable, Terms

log = get_logger(__name__)


class Membership:
    """Admits devices and lets them go.

    Args:
        table: The stored pool.
        calls: Run its calls.
        pool: Is told of every change.
        timeout_seconds: Longest wait for a device's answer over its stream.
        watch_timeout_seconds: Longest time of one watch over its stream.
    """

    def __init__(
        self,
        *,
        table: DeviceTable,
        calls: DatabaseCalls,
        pool: DevicePool,
        timeout_seconds: float,
        watch_timeout_seconds: float,
    ) -> None:
        self._table = table
        self._calls = calls
        self._pool = pool
        self._timeout = timeout_seconds
        self._watch_timeout = watch_timeout_seconds
        self._closing = False

    async def register(self, info: devices_pb2.DeviceInfo, instance_id: str, replaces: str) -> Terms:
        """Admit a device and return the terms of its lease.

        Raises:
            FailedPreconditionError: Another instance has its name.
        """
        await self._calls.call(self._table.register, info, instance_id, replaces)
        log.info("device registered", device_id=info.device_id, instance_id=instance_id, address=info.address)
        await self._pool.changed()
        return self._table.terms

    async def renew(self, device_id: str, instance_id: str) -> None:
        """Note a heartbeat, or raise NotFoundError."""
        await self._calls.call(self._table.renew, device_id, instance_id)

    async def leave(self, device_id: str, instance_id: str) -> None:
        """Let a device go."""
        await self._calls.call(self._table.leave, device_id, instance_id)
        log.info("device deregistered", device_id=device_id, instance_id=instance_id)
        await self._pool.changed()

    async def remove(self, device_id: str) -> None:
        """Forget a device.

        Raises:
            NotFoundError: There is none of this name.
            FailedPreconditionError: It has a lease.
        """
        await self._calls.call(self._table.remove, device_id)
        log.info("device removed", device_id=device_id)
        await self._pool.changed()

    async def devices(self) -> list[devices_pb2.Device]:
        """Return all devices."""
        return [self._pool.describe(device) for device in await self._calls.call(self._table.all)]

    @asynccontextmanager
    async def stream(self, device_id: str, instance_id: str) -> AsyncIterator[StreamLink]:
        """Have the pool reach a device over a stream, as long as the context lasts.

        Raises:
            NotFoundError: The instance is not registered.
            UnavailableError: This coordinator is about to end.
        """
        if self._closing:
            raise UnavailableError("the coordinator is about to end; connect again", reason="SERVER_STOPPING")
        link = StreamLink(device_id, instance_id, self._timeout, self._watch_timeout)
        await self._pool.attach(link)
        try:
            yield link
        finally:
            await self._pool.detach(link)

    async def close(self) -> None:
        """End all streams, and open no others."""
        self._closing = True
        await self._pool.close()
