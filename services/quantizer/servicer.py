"""QuantizerService: each call starts a job."""

from typing import Any

import grpc

from granq.v1 import quantizer_pb2, quantizer_pb2_grpc
from services.common.jobs import JobManager

KINDS = {
    "inspect": "services.quantizer.jobs:inspect",
    "quantize": "services.quantizer.jobs:quantize",
    "simulate": "services.quantizer.jobs:simulate",
    "export": "services.quantizer.jobs:export",
}


class QuantizerServicer(quantizer_pb2_grpc.QuantizerServiceServicer):
    """Starts the quantizer's jobs; JobService follows them."""

    def __init__(self, jobs: JobManager) -> None:
        self._jobs = jobs

    async def StartInspect(  # noqa: N802 - the generated base class names it
        self, request: quantizer_pb2.StartInspectRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> quantizer_pb2.StartInspectResponse:
        """Start or attach to an "inspect" job."""
        return quantizer_pb2.StartInspectResponse(job=await self._jobs.start("inspect", request.key, request))

    async def StartQuantize(  # noqa: N802
        self, request: quantizer_pb2.StartQuantizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> quantizer_pb2.StartQuantizeResponse:
        """Start, attach to or resume a "quantize" job."""
        return quantizer_pb2.StartQuantizeResponse(job=await self._jobs.start("quantize", request.key, request))

    async def StartSimulate(  # noqa: N802
        self, request: quantizer_pb2.StartSimulateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> quantizer_pb2.StartSimulateResponse:
        """Start or attach to a "simulate" job."""
        return quantizer_pb2.StartSimulateResponse(job=await self._jobs.start("simulate", request.key, request))

    async def StartExport(  # noqa: N802
        self, request: quantizer_pb2.StartExportRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> quantizer_pb2.StartExportResponse:
        """Start or attach to an "export" job."""
        return quantizer_pb2.StartExportResponse(job=await self._jobs.start("export", request.key, request))
