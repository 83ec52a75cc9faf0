"""A device's calls of the coordinator."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from granq.v1 import devices_pb2, devices_pb2_grpc
from services.common.errors import UnavailableError
from services.common.rpc.connection import Connection
from services.common.rpc.status import status_to_error
from services.common.security import SecuritySettings
from services.evaluator.serving import CallServing

_OPTIONS = (
    # Finds out within half a minute that the coordinator, or a router on the way, has forgotten the connection.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class CoordinatorClient:
    """DeviceService for one device. Calls raise the error that the coordinator told, or UnavailableError.

    Args:
        address: host:port of the coordinator.
        security: What this device shows there.
        max_message_bytes: Largest message, received or sent.
        timeout_seconds: Deadline of a unary call.
    """

    def __init__(
        self, address: str, security: SecuritySettings, *, max_message_bytes: int, timeout_seconds: float
    ) -> None:
        self._address = address
        self._timeout = timeout_seconds
        limits = (
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
        )
        self._connection = Connection(address, security, [*_OPTIONS, *limits], timeout_seconds)

    @property
    def _stub(self) -> "devices_pb2_grpc.DeviceServiceAsyncStub":
        return devices_pb2_grpc.DeviceServiceStub(self._connection.channel())

    async def register(self, request: devices_pb2.RegisterDeviceRequest) -> devices_pb2.RegisterDeviceResponse:
        """Enter the pool."""
        response: devices_pb2.RegisterDeviceResponse = await self._call(self._stub.RegisterDevice, request)
        return response

    async def renew(self, device_id: str, instance_id: str) -> None:
        """Send a heartbeat."""
        request = devices_pb2.SendHeartbeatRequest(device_id=device_id, instance_id=instance_id)
        await self._call(self._stub.SendHeartbeat, request)

    async def leave(self, device_id: str, instance_id: str) -> None:
        """Say goodbye."""
        request = devices_pb2.DeregisterDeviceRequest(device_id=device_id, instance_id=instance_id)
        await self._call(self._stub.DeregisterDevice, request)

    async def serve(self, device_id: str, instance_id: str, serving: CallServing) -> None:
        """Open a stream and answer the calls that come over it, until the coordinator ends it."""
        outgoing: asyncio.Queue[devices_pb2.ServeJobsRequest] = asyncio.Queue()
        greeting = devices_pb2.ServeJobsGreeting(device_id=device_id, instance_id=instance_id)
        outgoing.put_nowait(devices_pb2.ServeJobsRequest(greeting=greeting))

        async def messages() -> AsyncIterator[devices_pb2.ServeJobsRequest]:
            while True:
                yield await outgoing.get()

        stream = self._stub.ServeJobs(messages(), metadata=self._connection.metadata())
        try:
            await serving.serve(aiter(stream), outgoing.put_nowait)
        except grpc.aio.AioRpcError as error:
            raise self._as_error(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # The connection was closed, for one with new certificates; gRPC tells that as if the caller gave up.
            raise UnavailableError("the connection was closed", reason="COORDINATOR_UNAVAILABLE") from None
        finally:
            stream.cancel()

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout, metadata=self._connection.metadata())
        except grpc.aio.AioRpcError as error:
            raise self._as_error(error) from error

    def _as_error(self, error: grpc.aio.AioRpcError) -> Exception:
        if error.code() in _BROKEN:
            return UnavailableError(
                f"the coordinator at {self._address} does not answer: {error.details() or error.code().name}",
                reason="COORDINATOR_UNAVAILABLE",
            )
        return status_to_error(error)
