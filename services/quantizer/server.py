"""Assembly of the quantizer's server."""

from granq.v1 import quantizer_pb2_grpc
from services.common.artifacts import ArtifactStore
from services.common.jobs import JobManager
from services.common.rpc.server import GrpcServer
from services.quantizer.servicer import KINDS, QuantizerServicer
from services.quantizer.settings import QuantizerSettings


def create_server(settings: QuantizerSettings) -> GrpcServer:
    """Return the server, not started; called within its event loop."""
    store = ArtifactStore.of(settings)
    jobs = JobManager(store, settings, KINDS, settings.max_running_jobs)
    server = GrpcServer("quantizer", settings, jobs)
    server.add(quantizer_pb2_grpc.add_QuantizerServiceServicer_to_server, QuantizerServicer(jobs))
    return server
