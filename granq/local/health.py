"""Asks a server for its health without the generated classes of the health protocol.

Both messages are small enough to be constants: the empty request means the server as a whole, and the answer of a
serving one is field 1 = 1 (grpc.health.v1.HealthCheckResponse.SERVING). So the client needs no further dependency.
"""

import grpc
import grpc.aio

SERVING = b"\x08\x01"


def _same(message: bytes) -> bytes:
    return message


async def is_serving(address: str, timeout: float) -> bool:
    """Return whether the server at ``address`` answers SERVING within ``timeout`` seconds."""
    async with grpc.aio.insecure_channel(address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", _same, _same)
        try:
            answer = await check(b"", timeout=timeout, wait_for_ready=True)
        except grpc.aio.AioRpcError:
            return False
        return bytes(answer) == SERVING
