"""Client of the coordinator's artifacts, with this service's credentials; blocks."""

from typing import Any

import grpc

from granq.channel import open_channel
from granq.transfer import Transfers
from granq.v1 import artifacts_pb2_grpc
from services.common.rpc.connection import call_credentials
from services.common.rpc.tls import CallCredentials
from services.common.security import SecuritySettings

_TIMEOUT_SECONDS = 30.0


class _Stub(artifacts_pb2_grpc.ArtifactServiceStub):
    """The service's stub, whose calls carry the token as it is at their time."""

    def __init__(self, channel: grpc.Channel, credentials: CallCredentials) -> None:
        made: Any = artifacts_pb2_grpc.ArtifactServiceStub(channel)

        def carrying(call: Any) -> Any:
            return lambda request, timeout: call(request, timeout=timeout, metadata=credentials.metadata())

        self.UploadArtifact = carrying(made.UploadArtifact)
        self.DownloadArtifact = carrying(made.DownloadArtifact)
        self.GetArtifact = carrying(made.GetArtifact)


def open_transfers(address: str, security: SecuritySettings | None) -> Transfers:
    """Return transfers from and to a coordinator; nothing is connected yet.

    Args:
        address: host:port.
        security: What to show there; None for nothing, in plain text.

    Raises:
        FailedPreconditionError: As call_credentials.
    """
    if security is None:
        return Transfers(artifacts_pb2_grpc.ArtifactServiceStub(open_channel(address, None)), _TIMEOUT_SECONDS)
    credentials = call_credentials(address, security)
    return Transfers(_Stub(open_channel(address, credentials.channel()), credentials), _TIMEOUT_SECONDS)
