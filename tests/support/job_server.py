"""A worker with the job functions of tests.support.job_functions: `python -m tests.support.job_server`."""

from typing import Any

from granq.v1 import generator_pb2, generator_pb2_grpc
from services.common.artifacts import ArtifactStore
from services.common.jobs import JobManager
from services.common.rpc import GrpcServer, run
from services.common.settings import ServerSettings

FUNCTIONS = ("count", "until_cancelled", "never_checks", "dies_once")


class Servicer(generator_pb2_grpc.GeneratorServiceServicer):
    """Starts the job function that the model's architecture names."""

    def __init__(self, jobs: JobManager) -> None:
        self._jobs = jobs

    async def StartSynthesize(self, request: Any, context: Any) -> Any:  # noqa: N802
        job = await self._jobs.start(request.model.architecture, request.key, request)
        return generator_pb2.StartSynthesizeResponse(job=job)

    def CoTrain(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError


def create_server(settings: ServerSettings) -> GrpcServer:
    """Assemble the server."""
    store = ArtifactStore(settings.artifact_url, settings.cache_dir)
    kinds = {name: f"tests.support.job_functions:{name}" for name in FUNCTIONS}
    jobs = JobManager(store, settings, kinds, settings.max_running_jobs)
    server = GrpcServer("job-server", settings, jobs)
    server.add(generator_pb2_grpc.add_GeneratorServiceServicer_to_server, Servicer(jobs))
    return server


if __name__ == "__main__":
    run("job-server", ServerSettings(), create_server)
