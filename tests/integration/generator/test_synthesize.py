"""The synthesis job through a real server: result, resumption after a kill, refusals."""

from typing import Any

import grpc
import psutil
import torch
from safetensors.torch import load

from granq.v1 import common_pb2, generator_pb2, generator_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from services.common.artifacts import ArtifactStore
from services.common.rpc import GrpcServer


def _request(model: common_pb2.ModelSource, job_id: str, **fields: Any) -> generator_pb2.StartSynthesizeRequest:
    config = {"iterations": 60, "num_images": 20, "batch_size": 8, "checkpoint_interval": 5, "seed": 2} | fields
    return generator_pb2.StartSynthesizeRequest(
        key=jobs_pb2.JobKey(job_id=job_id), model=model, synthesis=common_pb2.SynthesisConfig(**config)
    )


async def _run(server: GrpcServer, request: generator_pb2.StartSynthesizeRequest, kill_at: int = -1) -> jobs_pb2.Job:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        job = (await generator_pb2_grpc.GeneratorServiceStub(channel).StartSynthesize(request)).job
        watch = jobs_pb2_grpc.JobServiceStub(channel).WatchJob(jobs_pb2.WatchJobRequest(job_id=job.key.job_id))
        async for event in watch:
            job = event.job
            if 0 <= kill_at <= job.progress.step and job.progress.phase == "synthesis":
                for child in psutil.Process().children():
                    if "services.common.jobs.child" in " ".join(child.cmdline()):
                        child.kill()
        return job


async def test_set_and_resumption(server: GrpcServer, model: common_pb2.ModelSource, store: ArtifactStore) -> None:
    undisturbed = await _run(server, _request(model, "undisturbed"))
    assert undisturbed.state == jobs_pb2.JOB_STATE_SUCCEEDED, undisturbed.failure
    result = undisturbed.result.synthesis
    tensors = load(store.read_bytes(result.dataset.digest))
    assert tensors["images"].shape == (20, 3, 8, 8)
    assert result.num_images == 20
    assert result.bn_loss > 0
    assert result.label_agreement == float((tensors["logits"].argmax(1) == tensors["labels"]).double().mean())
    assert torch.isfinite(tensors["images"]).all()

    request = _request(model, "interrupted", checkpoint_interval=2)
    interrupted = await _run(server, request, kill_at=4)
    assert (interrupted.state, interrupted.failure.reason) == (jobs_pb2.JOB_STATE_FAILED, "JOB_PROCESS_DIED")
    interrupted = await _run(server, request)
    assert interrupted.result.synthesis.dataset.digest == result.dataset.digest
    assert interrupted.result.synthesis.grid.digest == result.grid.digest
    assert store.read_bytes(result.grid.digest).startswith(b"\x89PNG")
    assert interrupted.result.synthesis.bn_loss == result.bn_loss


async def test_a_set_of_refined_images_alone_trains_no_generator(
    server: GrpcServer, model: common_pb2.ModelSource, store: ArtifactStore
) -> None:
    job = await _run(server, _request(model, "refined", refined_share=1.0, iterations=10_000_000))
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.failure
    other = await _run(server, _request(model, "rough", refined_share=1.0, refinement_steps=1))
    assert job.result.synthesis.label_agreement > other.result.synthesis.label_agreement
    assert job.result.synthesis.bn_loss > 0


async def test_unusable_model_fails_the_job(server: GrpcServer, store: ArtifactStore) -> None:
    model = common_pb2.ModelSource(artifact=store.put_bytes(b"no model"))
    job = await _run(server, _request(model, "bad"))
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    assert (job.failure.code, job.failure.reason) == (3, "MODEL_FORMAT_UNKNOWN")
    assert job.failure.field == "model.artifact"
