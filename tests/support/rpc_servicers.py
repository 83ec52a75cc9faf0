"""Servicers that answer as a test tells them, in every style in which a handler can be written."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from granq.v1 import artifacts_pb2, artifacts_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from services.common.principal import current_principal

DIGEST = "sha256:" + "0" * 64


class AsyncArtifacts(artifacts_pb2_grpc.ArtifactServiceServicer):
    """Coroutines and asynchronous generators.

    Attributes:
        error: Raised by every method, in streams after the first message.
        left: Set when a stream's handler was left, however it ended.
    """

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.left = asyncio.Event()
        self.entered = asyncio.Event()
        self.hang = False

    async def GetArtifact(self, request: artifacts_pb2.GetArtifactRequest, context: Any) -> Any:  # noqa: N802
        self.entered.set()
        if self.hang:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return artifacts_pb2.GetArtifactResponse(artifact=artifacts_pb2.Artifact(digest=request.digest, size_bytes=1))

    async def DownloadArtifact(  # noqa: N802
        self, request: artifacts_pb2.DownloadArtifactRequest, context: Any
    ) -> AsyncIterator[artifacts_pb2.DownloadArtifactResponse]:
        try:
            yield artifacts_pb2.DownloadArtifactResponse(chunk=b"1")
            if self.hang:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
            yield artifacts_pb2.DownloadArtifactResponse(chunk=b"2")
        finally:
            self.left.set()

    async def UploadArtifact(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        size = 0
        async for message in request_iterator:
            size += len(message.chunk)
            if self.error is not None:
                raise self.error
        return artifacts_pb2.UploadArtifactResponse(artifact=artifacts_pb2.Artifact(digest=DIGEST, size_bytes=size))


class ContextArtifacts(AsyncArtifacts):
    """The other asynchronous style: reads from and writes to the context."""

    async def DownloadArtifact(self, request: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        await context.write(artifacts_pb2.DownloadArtifactResponse(chunk=b"1"))
        if self.error is not None:
            raise self.error
        await context.write(artifacts_pb2.DownloadArtifactResponse(chunk=b"2"))

    async def UploadArtifact(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        size = 0
        while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            size += len(message.chunk)
            if self.error is not None:
                raise self.error
        return artifacts_pb2.UploadArtifactResponse(artifact=artifacts_pb2.Artifact(digest=DIGEST, size_bytes=size))


class PlainArtifacts(artifacts_pb2_grpc.ArtifactServiceServicer):
    """Plain functions and generators, which block a thread."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def GetArtifact(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self.error is not None:
            raise self.error
        return artifacts_pb2.GetArtifactResponse(artifact=artifacts_pb2.Artifact(digest=request.digest, size_bytes=1))

    def DownloadArtifact(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        yield artifacts_pb2.DownloadArtifactResponse(chunk=b"1")
        if self.error is not None:
            raise self.error
        yield artifacts_pb2.DownloadArtifactResponse(chunk=b"2")

    def UploadArtifact(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        size = 0
        for message in request_iterator:
            size += len(message.chunk)
            if self.error is not None:
                raise self.error
        return artifacts_pb2.UploadArtifactResponse(artifact=artifacts_pb2.Artifact(digest=DIGEST, size_bytes=size))


class AbortingArtifacts(artifacts_pb2_grpc.ArtifactServiceServicer):
    """Ends its calls through the context."""

    async def GetArtifact(self, request: Any, context: Any) -> Any:  # noqa: N802
        await context.abort(grpc.StatusCode.ABORTED, "by hand")

    async def DownloadArtifact(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield artifacts_pb2.DownloadArtifactResponse(chunk=b"1")
        context.set_code(grpc.StatusCode.OUT_OF_RANGE)
        context.set_details("set")

    async def UploadArtifact(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        await context.abort(grpc.StatusCode.ABORTED, "by hand")


class CallerJobs(jobs_pb2_grpc.JobServiceServicer):
    """A worker's JobService whose one job has the caller's name as its kind."""

    def _job(self) -> jobs_pb2.Job:
        return jobs_pb2.Job(kind=current_principal().name)

    async def GetJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        return jobs_pb2.GetJobResponse(job=self._job())

    async def ListJobs(self, request: Any, context: Any) -> Any:  # noqa: N802
        return jobs_pb2.ListJobsResponse(jobs=[self._job()])

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield jobs_pb2.WatchJobResponse(job=self._job())

    async def CancelJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        return jobs_pb2.CancelJobResponse(job=self._job())
