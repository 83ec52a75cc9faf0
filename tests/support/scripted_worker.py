"""A worker that is generator, quantizer and evaluator in one, with the real job machinery and scripted jobs.

Run as a process: `python -m tests.support.scripted_worker`, settings from the environment.
"""

from collections.abc import Callable
from typing import Any

import grpc

from granq.v1 import (
    common_pb2,
    evaluator_pb2,
    evaluator_pb2_grpc,
    generator_pb2,
    generator_pb2_grpc,
    jobs_pb2,
    quantizer_pb2,
    quantizer_pb2_grpc,
)
from services.common.artifacts import ArtifactStore
from services.common.errors import from_failure
from services.common.jobs import JobManager
from services.common.rpc import GrpcServer, run
from tests.support.scripted_jobs import KINDS, Script, ScriptedSettings

_Context = grpc.aio.ServicerContext[Any, Any]


class _Starter:
    """Starts jobs; a script may refuse at once (`refuse`) instead of in the job."""

    def __init__(self, jobs: JobManager, script: Script) -> None:
        self.jobs = jobs
        self.script = script

    async def start(self, kind: str, request: Any) -> jobs_pb2.Job:
        self.script.log(kind, "started", request.key.job_id)
        refusal = self.script.read(kind).get("refuse")
        if refusal:
            raise from_failure(common_pb2.Failure(**refusal))
        return await self.jobs.start(kind, request.key, request)


class ScriptedGenerator(generator_pb2_grpc.GeneratorServiceServicer):
    def __init__(self, starter: _Starter) -> None:
        self._starter = starter

    async def StartSynthesize(  # noqa: N802
        self, request: generator_pb2.StartSynthesizeRequest, context: _Context
    ) -> generator_pb2.StartSynthesizeResponse:
        return generator_pb2.StartSynthesizeResponse(job=await self._starter.start("synthesize", request))

    def CoTrain(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError


class ScriptedQuantizer(quantizer_pb2_grpc.QuantizerServiceServicer):
    def __init__(self, starter: _Starter) -> None:
        self._starter = starter

    async def StartInspect(  # noqa: N802
        self, request: quantizer_pb2.StartInspectRequest, context: _Context
    ) -> quantizer_pb2.StartInspectResponse:
        return quantizer_pb2.StartInspectResponse(job=await self._starter.start("inspect", request))

    async def StartQuantize(  # noqa: N802
        self, request: quantizer_pb2.StartQuantizeRequest, context: _Context
    ) -> quantizer_pb2.StartQuantizeResponse:
        return quantizer_pb2.StartQuantizeResponse(job=await self._starter.start("quantize", request))

    async def StartSimulate(  # noqa: N802
        self, request: quantizer_pb2.StartSimulateRequest, context: _Context
    ) -> quantizer_pb2.StartSimulateResponse:
        return quantizer_pb2.StartSimulateResponse(job=await self._starter.start("simulate", request))

    async def StartExport(  # noqa: N802
        self, request: quantizer_pb2.StartExportRequest, context: _Context
    ) -> quantizer_pb2.StartExportResponse:
        return quantizer_pb2.StartExportResponse(job=await self._starter.start("export", request))


class ScriptedEvaluator(evaluator_pb2_grpc.EvaluatorServiceServicer):
    def __init__(self, starter: _Starter) -> None:
        self._starter = starter

    def GetCapabilities(self, request: Any, context: Any) -> evaluator_pb2.GetCapabilitiesResponse:  # noqa: N802
        return evaluator_pb2.GetCapabilitiesResponse()

    async def StartEvaluate(  # noqa: N802
        self, request: evaluator_pb2.StartEvaluateRequest, context: _Context
    ) -> evaluator_pb2.StartEvaluateResponse:
        return evaluator_pb2.StartEvaluateResponse(job=await self._starter.start("evaluate", request))

    async def StartBuildEngine(  # noqa: N802
        self, request: evaluator_pb2.StartBuildEngineRequest, context: _Context
    ) -> evaluator_pb2.StartBuildEngineResponse:
        return evaluator_pb2.StartBuildEngineResponse(job=await self._starter.start("build_engine", request))


def create_server(settings: ScriptedSettings) -> GrpcServer:
    """Assemble the worker."""
    jobs = JobManager(ArtifactStore(settings.artifact_url), settings, KINDS, settings.max_running_jobs, kill_after=1.0)
    starter = _Starter(jobs, Script(settings.script_dir))
    server = GrpcServer("scripted worker", settings, jobs)
    services: tuple[tuple[Callable[..., None], object], ...] = (
        (generator_pb2_grpc.add_GeneratorServiceServicer_to_server, ScriptedGenerator(starter)),
        (quantizer_pb2_grpc.add_QuantizerServiceServicer_to_server, ScriptedQuantizer(starter)),
        (evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server, ScriptedEvaluator(starter)),
    )
    for register, servicer in services:
        server.add(register, servicer)
    return server


if __name__ == "__main__":
    run("scripted worker", ScriptedSettings(), create_server)
