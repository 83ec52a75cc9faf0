"""gRPC as all services use it: server assembly, interceptors, and errors on the wire."""

from services.common.rpc.server import GrpcServer, run
from services.common.rpc.status import status_to_error

__all__ = ["GrpcServer", "run", "status_to_error"]
