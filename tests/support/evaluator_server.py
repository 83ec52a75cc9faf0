"""The evaluator's real server in the test's process, with real job processes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from granq.v1 import artifacts_pb2, common_pb2, evaluator_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from services.common.artifacts import ArtifactStore
from services.common.rpc import GrpcServer
from services.evaluator.server import create_server
from services.evaluator.settings import EvaluatorSettings
from tests.support.onnx_graphs import images, quantized


class Evaluator:
    """A running server with its clients and its store."""

    def __init__(self, server: GrpcServer, settings: EvaluatorSettings, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.datasets = settings.dataset_root
        self.store = ArtifactStore(settings.artifact_url)
        self.calls = evaluator_pb2_grpc.EvaluatorServiceStub(channel)
        self.jobs = jobs_pb2_grpc.JobServiceStub(channel)

    def put(self, **options: object) -> artifacts_pb2.Artifact:
        return self.store.put_bytes(quantized(**options).SerializeToString())

    def labelled(self, count: int) -> common_pb2.Dataset:
        np.savez(self.datasets / "set.npz", images=images(count), labels=np.zeros(count, int))
        return common_pb2.Dataset(path="set.npz", format=common_pb2.DATASET_FORMAT_NPZ)

    async def ended(self, job_id: str) -> tuple[jobs_pb2.Job, list[str]]:
        """Follow a job to its end; return it and the phases it went through."""
        phases: list[str] = []
        job = jobs_pb2.Job()
        async for event in self.jobs.WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id)):
            job = event.job
            if job.HasField("progress"):
                phases.append(job.progress.phase)
        return job, list(dict.fromkeys(phases))


@asynccontextmanager
async def running_evaluator(folder: Path, **settings: Any) -> AsyncIterator[Evaluator]:
    """Run an evaluator whose files are in a folder."""
    root = folder / "datasets"
    root.mkdir()
    defaults: dict[str, Any] = {"onnx_threads": 1, "latency_repeats": 2, "log_level": "WARNING"}
    chosen = EvaluatorSettings(
        port=0, artifact_url=(folder / "artifacts").as_uri(), dataset_root=root, **(defaults | settings)
    )
    server = create_server(chosen)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Evaluator(server, chosen, channel)
    finally:
        await server.stop(0)


def key(name: str) -> jobs_pb2.JobKey:
    """Return the key of a job."""
    return jobs_pb2.JobKey(job_id=name, pipeline_id="pipeline")
