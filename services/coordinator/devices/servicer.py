"""DeviceService."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from granq.v1 import devices_pb2, devices_pb2_grpc
from services.common.errors import InvalidArgumentError
from services.coordinator.devices.links import StreamLink
from services.coordinator.devices.membership import Membership

_Context = grpc.aio.ServicerContext[Any, Any]


class DeviceServicer(devices_pb2_grpc.DeviceServiceServicer):
    """Admits devices to the pool, and holds their streams.

    Args:
        membership: Who is in the pool.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    async def RegisterDevice(  # noqa: N802
        self, request: devices_pb2.RegisterDeviceRequest, context: _Context
    ) -> devices_pb2.RegisterDeviceResponse:
        """Admit a device."""
        terms = await self._membership.register(request.info, request.instance_id, request.replaces_instance_id)
        return devices_pb2.RegisterDeviceResponse(
            heartbeat_seconds=terms.heartbeat_seconds, lease_seconds=terms.lease_seconds
        )

    async def SendHeartbeat(  # noqa: N802
        self, request: devices_pb2.SendHeartbeatRequest, context: _Context
    ) -> devices_pb2.SendHeartbeatResponse:
        """Renew a lease."""
        await self._membership.renew(request.device_id, request.instance_id)
        return devices_pb2.SendHeartbeatResponse()

    async def DeregisterDevice(  # noqa: N802
        self, request: devices_pb2.DeregisterDeviceRequest, context: _Context
    ) -> devices_pb2.DeregisterDeviceResponse:
        """End a lease."""
        await self._membership.leave(request.device_id, request.instance_id)
        return devices_pb2.DeregisterDeviceResponse()

    async def ServeJobs(  # noqa: N802
        self, request_iterator: AsyncIterator[devices_pb2.ServeJobsRequest], context: _Context
    ) -> AsyncIterator[devices_pb2.ServeJobsResponse]:
        """Send calls to a device, and take its answers."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("payload") != "greeting":
            raise InvalidArgumentError("the first message must be the greeting", field="greeting")
        async with self._membership.stream(first.greeting.device_id, first.greeting.instance_id) as link:
            taking = asyncio.create_task(self._take(request_iterator, link))
            try:
                async for message in link.outgoing():
                    yield message
            finally:
                taking.cancel()
                await asyncio.gather(taking, return_exceptions=True)

    async def _take(self, messages: AsyncIterator[devices_pb2.ServeJobsRequest], link: StreamLink) -> None:
        try:
            async for message in messages:
                link.take(message)
        finally:
            await link.close()  # the device has gone, or sent something that is not of the contract

    async def ListDevices(  # noqa: N802
        self, request: devices_pb2.ListDevicesRequest, context: _Context
    ) -> devices_pb2.ListDevicesResponse:
        """Return all devices."""
        return devices_pb2.ListDevicesResponse(devices=await self._membership.devices())

    async def RemoveDevice(  # noqa: N802
        self, request: devices_pb2.RemoveDeviceRequest, context: _Context
    ) -> devices_pb2.RemoveDeviceResponse:
        """Forget a device."""
        await self._membership.remove(request.device_id)
        return devices_pb2.RemoveDeviceResponse()
