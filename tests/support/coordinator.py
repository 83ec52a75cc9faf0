"""A coordinator and a scripted worker as real servers, and a client that asserts."""

import hashlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from granq.v1 import artifacts_pb2, artifacts_pb2_grpc, coordinator_pb2, coordinator_pb2_grpc
from services.common.artifacts import ArtifactStore
from services.coordinator.server import CoordinatorServer, create_server
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.transitions import ENDED, State
from tests.support import scripted_worker
from tests.support.pipelines import spec, sqlite_url
from tests.support.scripted_jobs import Script, ScriptedSettings
from tests.support.servers import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0


class Client:
    """Calls of a coordinator, with deadlines."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.pipelines: coordinator_pb2_grpc.PipelineServiceAsyncStub = coordinator_pb2_grpc.PipelineServiceStub(
            self.channel
        )
        self.artifacts: artifacts_pb2_grpc.ArtifactServiceAsyncStub = artifacts_pb2_grpc.ArtifactServiceStub(
            self.channel
        )

    async def submit(
        self, made: coordinator_pb2.PipelineSpec | None = None, request_id: str = ""
    ) -> coordinator_pb2.Pipeline:
        if made is None:
            made = spec(await self.upload(b"model"))
        request = coordinator_pb2.SubmitPipelineRequest(spec=made, request_id=request_id)
        return (await self.pipelines.SubmitPipeline(request, timeout=PATIENCE)).pipeline

    async def get(self, pipeline_id: str) -> coordinator_pb2.Pipeline:
        request = coordinator_pb2.GetPipelineRequest(pipeline_id=pipeline_id)
        return (await self.pipelines.GetPipeline(request, timeout=PATIENCE)).pipeline

    async def cancel(self, pipeline_id: str) -> coordinator_pb2.Pipeline:
        request = coordinator_pb2.CancelPipelineRequest(pipeline_id=pipeline_id)
        return (await self.pipelines.CancelPipeline(request, timeout=PATIENCE)).pipeline

    async def retry(self, pipeline_id: str) -> coordinator_pb2.Pipeline:
        request = coordinator_pb2.RetryPipelineRequest(pipeline_id=pipeline_id)
        return (await self.pipelines.RetryPipeline(request, timeout=PATIENCE)).pipeline

    async def delete(self, pipeline_id: str) -> None:
        request = coordinator_pb2.DeletePipelineRequest(pipeline_id=pipeline_id)
        await self.pipelines.DeletePipeline(request, timeout=PATIENCE)

    async def watch(self, pipeline_id: str, after: int = 0) -> AsyncIterator[coordinator_pb2.WatchPipelineResponse]:
        request = coordinator_pb2.WatchPipelineRequest(pipeline_id=pipeline_id, after_sequence=after)
        async for event in self.pipelines.WatchPipeline(request, timeout=PATIENCE):
            yield event

    async def follow(self, pipeline_id: str, after: int = 0) -> list[coordinator_pb2.WatchPipelineResponse]:
        """Return all events up to the end, which are numbered without gaps."""
        events = [event async for event in self.watch(pipeline_id, after)]
        assert [event.sequence for event in events] == list(range(after + 1, after + 1 + len(events)))
        assert events[-1].state in ENDED
        return events

    async def until(
        self, pipeline_id: str, condition: Callable[[coordinator_pb2.WatchPipelineResponse], bool], after: int = 0
    ) -> coordinator_pb2.WatchPipelineResponse:
        """Return the first event that fulfils a condition."""
        async for event in self.watch(pipeline_id, after):
            if condition(event):
                return event
        raise AssertionError("the pipeline ended before")

    async def finish(self, pipeline_id: str, state: int = State.PIPELINE_STATE_SUCCEEDED) -> coordinator_pb2.Pipeline:
        """Follow a pipeline to its end, which is the given one, and return it."""
        await self.follow(pipeline_id)
        pipeline = await self.get(pipeline_id)
        assert pipeline.state == state, pipeline
        return pipeline

    async def upload(self, content: bytes, chunk: int = 1024 * 1024, **header: object) -> artifacts_pb2.Artifact:
        async def messages() -> AsyncIterator[artifacts_pb2.UploadArtifactRequest]:
            yield artifacts_pb2.UploadArtifactRequest(header=artifacts_pb2.UploadHeader(**header))  # type: ignore[arg-type]
            for begin in range(0, len(content), chunk):
                yield artifacts_pb2.UploadArtifactRequest(chunk=content[begin : begin + chunk])

        return (await self.artifacts.UploadArtifact(messages(), timeout=PATIENCE)).artifact

    async def download(self, digest: str, offset: int = 0) -> bytes:
        request = artifacts_pb2.DownloadArtifactRequest(digest=digest, offset=offset)
        parts = [message.chunk async for message in self.artifacts.DownloadArtifact(request, timeout=PATIENCE)]
        return b"".join(parts)

    async def close(self) -> None:
        await self.channel.close(None)


def digest_of(content: bytes) -> str:
    """Return the digest as an artifact names it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Bench:
    """A coordinator and a scripted worker in this process, on ports of their own, over one store."""

    def __init__(self, folder: Path, database_url: str = "", **settings: object) -> None:
        self.folder = folder
        self.script = Script(folder / "script")
        self.store = ArtifactStore((folder / "artifacts").as_uri())
        self.database_url = database_url or sqlite_url(folder)
        self._settings = settings
        self.coordinator: CoordinatorServer | None = None
        self.client: Client | None = None
        self.worker = scripted_worker.create_server(
            ScriptedSettings(
                artifact_url=self.store.url, script_dir=self.script.folder, max_running_jobs=8, metrics_port=0
            )
        )

    async def start_coordinator(self, **settings: object) -> Client:
        """Start, or start again after `stop_coordinator`; returns a client of it."""
        address = f"127.0.0.1:{self.worker.port}"
        values: dict[str, object] = {
            "port": 0,
            "metrics_port": 0,
            "artifact_url": self.store.url,
            "database_url": self.database_url,
            "generator_address": address,
            "quantizer_address": address,
            "evaluator_address": address,
            **self._settings,
            **settings,
        }
        self.coordinator = create_server(CoordinatorSettings(**values))  # type: ignore[arg-type]
        await self.coordinator.start()
        self.client = Client(f"127.0.0.1:{self.coordinator.port}")
        return self.client

    async def stop_coordinator(self) -> None:
        """Stop it gracefully."""
        if self.client is not None:
            await self.client.close()
        if self.coordinator is not None:
            await self.coordinator.stop(1)


@asynccontextmanager
async def bench(folder: Path, database_url: str = "", **settings: object) -> AsyncIterator[Bench]:
    """Start worker and coordinator, and stop both at the end."""
    made = Bench(folder, database_url, **settings)
    await made.worker.start()
    try:
        await made.start_coordinator()
        try:
            yield made
        finally:
            await made.stop_coordinator()
    finally:
        await made.worker.stop(0)


class WorkerProcess(ServerProcess):
    """A scripted worker in a process of its own."""

    def __init__(self, folder: Path, name: str = "worker", **settings: str) -> None:
        super().__init__(name, folder, **{"script_dir": str(folder / "script"), "max_running_jobs": "8", **settings})
        self.script = Script(folder / "script")

    @property
    def module(self) -> str:
        return scripted_worker.__name__

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}


class CoordinatorProcess(ServerProcess):
    """A coordinator in a process of its own, whose workers are one scripted worker."""

    def __init__(self, folder: Path, worker_address: str, name: str = "coordinator", **settings: str) -> None:
        addresses = {f"{worker}_address": worker_address for worker in ("generator", "quantizer", "evaluator")}
        super().__init__(name, folder, **{"database_url": sqlite_url(folder), **addresses, **settings})

    @property
    def module(self) -> str:
        return "services.coordinator"
