"""EvaluatorService."""

import asyncio
from typing import Any

import grpc

from granq.v1 import evaluator_pb2, evaluator_pb2_grpc
from services.common.jobs import JobManager
from services.evaluator import runtimes
from services.evaluator.engine_model import require_fit

KINDS = {
    "evaluate": "services.evaluator.jobs:evaluate",
    "build_engine": "services.evaluator.jobs:build_engine",
}


class EvaluatorServicer(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """Starts the evaluator's jobs; what can be refused without a job is refused at once."""

    def __init__(self, jobs: JobManager) -> None:
        self._jobs = jobs

    async def GetCapabilities(  # noqa: N802
        self, request: evaluator_pb2.GetCapabilitiesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> evaluator_pb2.GetCapabilitiesResponse:
        """Say what can be run and built here."""
        return await asyncio.to_thread(runtimes.capabilities)

    async def StartEvaluate(  # noqa: N802
        self, request: evaluator_pb2.StartEvaluateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> evaluator_pb2.StartEvaluateResponse:
        """Start a measurement; an engine that does not run here is refused before it is loaded."""
        if request.HasField("engine"):
            await asyncio.to_thread(require_fit, request.engine)
        return evaluator_pb2.StartEvaluateResponse(job=await self._jobs.start("evaluate", request.key, request))

    async def StartBuildEngine(  # noqa: N802
        self, request: evaluator_pb2.StartBuildEngineRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> evaluator_pb2.StartBuildEngineResponse:
        """Start a build, where the target's runtime is installed and can build."""
        await asyncio.to_thread(runtimes.choose, request.target)
        return evaluator_pb2.StartBuildEngineResponse(job=await self._jobs.start("build_engine", request.key, request))
