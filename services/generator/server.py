"""Assembly of the generator's server. Nothing here imports torch: trainings run in processes of their own."""

from granq.v1 import generator_pb2_grpc
from services.common.artifacts import ArtifactStore
from services.common.jobs import JobManager
from services.common.rpc import GrpcServer
from services.generator.servicer import KINDS, GeneratorServicer
from services.generator.sessions import JointSessions
from services.generator.settings import GeneratorSettings


def create_server(settings: GeneratorSettings) -> GrpcServer:
    """Return the generator's server, not yet started.

    Raises:
        UnavailableError: The artifact store cannot be reached.
    """
    store = ArtifactStore.of(settings)
    jobs = JobManager(store, settings, KINDS, settings.max_running_jobs)
    server = GrpcServer("generator", settings, jobs)
    sessions = JointSessions(settings, jobs.usage)
    server.manage(sessions)
    server.add(generator_pb2_grpc.add_GeneratorServiceServicer_to_server, GeneratorServicer(jobs, sessions))
    return server
