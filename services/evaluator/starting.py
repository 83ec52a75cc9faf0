"""Starts the evaluator's jobs, however the request came; what can be refused without a job is refused at once."""

import asyncio

from granq.v1 import evaluator_pb2, jobs_pb2
from services.common.jobs import JobManager
from services.evaluator import runtimes
from services.evaluator.engine_model import require_fit

KINDS = {
    "evaluate": "services.evaluator.jobs:evaluate",
    "build_engine": "services.evaluator.jobs:build_engine",
}


class JobStarter:
    """Starts jobs.

    Args:
        jobs: Runs them.
    """

    def __init__(self, jobs: JobManager) -> None:
        self._jobs = jobs

    async def evaluate(self, request: evaluator_pb2.StartEvaluateRequest) -> jobs_pb2.Job:
        """Start a measurement; an engine that does not run here is refused before it is loaded.

        Raises:
            GranqError: It is refused, or as JobManager.start.
        """
        if request.HasField("engine"):
            await asyncio.to_thread(require_fit, request.engine)
        return await self._jobs.start("evaluate", request.key, request)

    async def build_engine(self, request: evaluator_pb2.StartBuildEngineRequest) -> jobs_pb2.Job:
        """Start a build, where the target's runtime is installed and can build.

        Raises:
            GranqError: It is refused, or as JobManager.start.
        """
        await asyncio.to_thread(runtimes.choose, request.target)
        return await self._jobs.start("build_engine", request.key, request)
