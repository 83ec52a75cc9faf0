"""The coordinator's RPCs: each unpacks a request, calls the domain, and packs the answer."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from granq.v1 import artifacts_pb2, artifacts_pb2_grpc, coordinator_pb2, coordinator_pb2_grpc
from services.coordinator.ownership import OwnArtifacts, OwnPipelines

_Context = grpc.aio.ServicerContext[Any, Any]


class PipelineServicer(coordinator_pb2_grpc.PipelineServiceServicer):
    """PipelineService."""

    def __init__(self, pipelines: OwnPipelines) -> None:
        self._pipelines = pipelines

    async def SubmitPipeline(  # noqa: N802
        self, request: coordinator_pb2.SubmitPipelineRequest, context: _Context
    ) -> coordinator_pb2.SubmitPipelineResponse:
        """Start a pipeline."""
        pipeline = await self._pipelines.submit(request.spec, request.request_id)
        return coordinator_pb2.SubmitPipelineResponse(pipeline=pipeline)

    async def GetPipeline(  # noqa: N802
        self, request: coordinator_pb2.GetPipelineRequest, context: _Context
    ) -> coordinator_pb2.GetPipelineResponse:
        """Return one pipeline."""
        return coordinator_pb2.GetPipelineResponse(pipeline=await self._pipelines.get(request.pipeline_id))

    async def ListPipelines(  # noqa: N802
        self, request: coordinator_pb2.ListPipelinesRequest, context: _Context
    ) -> coordinator_pb2.ListPipelinesResponse:
        """Return a page of pipelines."""
        pipelines, token = await self._pipelines.page(list(request.states), request.page_size, request.page_token)
        return coordinator_pb2.ListPipelinesResponse(pipelines=pipelines, next_page_token=token)

    async def WatchPipeline(  # noqa: N802
        self, request: coordinator_pb2.WatchPipelineRequest, context: _Context
    ) -> AsyncIterator[coordinator_pb2.WatchPipelineResponse]:
        """Stream a pipeline's events."""
        async with aclosing(self._pipelines.watch(request.pipeline_id, request.after_sequence)) as events:
            async for event in events:
                yield event

    async def CancelPipeline(  # noqa: N802
        self, request: coordinator_pb2.CancelPipelineRequest, context: _Context
    ) -> coordinator_pb2.CancelPipelineResponse:
        """Ask a pipeline to stop."""
        return coordinator_pb2.CancelPipelineResponse(pipeline=await self._pipelines.cancel(request.pipeline_id))

    async def RetryPipeline(  # noqa: N802
        self, request: coordinator_pb2.RetryPipelineRequest, context: _Context
    ) -> coordinator_pb2.RetryPipelineResponse:
        """Continue a pipeline."""
        return coordinator_pb2.RetryPipelineResponse(pipeline=await self._pipelines.retry(request.pipeline_id))

    async def DeletePipeline(  # noqa: N802
        self, request: coordinator_pb2.DeletePipelineRequest, context: _Context
    ) -> coordinator_pb2.DeletePipelineResponse:
        """Remove a pipeline."""
        await self._pipelines.delete(request.pipeline_id)
        return coordinator_pb2.DeletePipelineResponse()


class ArtifactServicer(artifacts_pb2_grpc.ArtifactServiceServicer):
    """ArtifactService."""

    def __init__(self, artifacts: OwnArtifacts) -> None:
        self._artifacts = artifacts

    async def UploadArtifact(  # noqa: N802
        self, request_iterator: AsyncIterator[artifacts_pb2.UploadArtifactRequest], context: _Context
    ) -> artifacts_pb2.UploadArtifactResponse:
        """Store one blob."""
        return artifacts_pb2.UploadArtifactResponse(artifact=await self._artifacts.receive(request_iterator))

    async def DownloadArtifact(  # noqa: N802
        self, request: artifacts_pb2.DownloadArtifactRequest, context: _Context
    ) -> AsyncIterator[artifacts_pb2.DownloadArtifactResponse]:
        """Stream one blob."""
        async with aclosing(self._artifacts.send(request.digest, request.offset)) as messages:
            async for message in messages:
                yield message

    async def GetArtifact(  # noqa: N802
        self, request: artifacts_pb2.GetArtifactRequest, context: _Context
    ) -> artifacts_pb2.GetArtifactResponse:
        """Return a blob's identity."""
        return artifacts_pb2.GetArtifactResponse(artifact=await self._artifacts.stat(request.digest))
