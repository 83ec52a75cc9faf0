"""`python -m services.common.rpc.health [HOST:PORT]`: asks a server whether it serves; for Docker's HEALTHCHECK.

Ends with 0 if it does, else with 1 and the reason on standard error. Without an argument it asks this machine's port
GRANQ_HEALTH_PORT or GRANQ_PORT, where the server in the same container listens. It speaks plain text, so a server with
TLS needs the former.
"""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_SECONDS = 5.0


def unhealthy(address: str) -> str:
    """Return why the server at host:port does not serve, or "" if it does."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return "" if answer.status == health_pb2.HealthCheckResponse.SERVING else status


def main(arguments: list[str]) -> int:
    """Ask the server that the arguments or the environment name, and return the exit code."""
    port = os.environ.get("GRANQ_HEALTH_PORT") or os.environ.get("GRANQ_PORT")
    if len(arguments) > 1 or not (arguments or port):
        print("usage: python -m services.common.rpc.health HOST:PORT (or set GRANQ_PORT)", file=sys.stderr)  # noqa: T201
        return 2
    address = arguments[0] if arguments else f"127.0.0.1:{port}"
    reason = unhealthy(address)
    if reason:
        print(f"{address} does not serve: {reason}", file=sys.stderr)  # noqa: T201
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
