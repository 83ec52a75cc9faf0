"""Assembly of the evaluator's server."""

from granq.v1 import evaluator_pb2_grpc
from services.common.artifacts import ArtifactStore
from services.common.jobs import JobManager
from services.common.rpc import GrpcServer
from services.evaluator.metrics import observe
from services.evaluator.servicer import KINDS, EvaluatorServicer
from services.evaluator.settings import EvaluatorSettings


def create_server(settings: EvaluatorSettings) -> GrpcServer:
    """Return the server, not yet started. Call within the event loop that it will run in."""
    store = ArtifactStore(settings.artifact_url, settings.cache_dir)
    jobs = JobManager(store, settings, KINDS, settings.max_running_jobs, on_success=observe)
    server = GrpcServer("evaluator", settings, jobs)
    server.add(evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server, EvaluatorServicer(jobs))
    return server
