"""EvaluatorService."""

import asyncio
from typing import Any

import grpc

from granq.v1 import evaluator_pb2, evaluator_pb2_grpc
from services.evaluator import runtimes
from services.evaluator.starting import JobStarter


class EvaluatorServicer(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """Starts the evaluator's jobs."""

    def __init__(self, starter: JobStarter) -> None:
        self._starter = starter

    async def GetCapabilities(  # noqa: N802
        self, request: evaluator_pb2.GetCapabilitiesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> evaluator_pb2.GetCapabilitiesResponse:
        """Say what can be run and built here."""
        return await asyncio.to_thread(runtimes.capabilities)

    async def StartEvaluate(  # noqa: N802
        self, request: evaluator_pb2.StartEvaluateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> evaluator_pb2.StartEvaluateResponse:
        """Start a measurement."""
        return evaluator_pb2.StartEvaluateResponse(job=await self._starter.evaluate(request))

    async def StartBuildEngine(  # noqa: N802
        self, request: evaluator_pb2.StartBuildEngineRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> evaluator_pb2.StartBuildEngineResponse:
        """Start a build."""
        return evaluator_pb2.StartBuildEngineResponse(job=await self._starter.build_engine(request))
