"""The evaluator as others meet it: a real server, real job processes, real graphs and engines."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from granq.engines.machine import find_gpu
from granq.v1 import common_pb2, evaluator_pb2, jobs_pb2, reports_pb2
from services.evaluator import runtimes
from tests.support.evaluator_server import Evaluator, key, running_evaluator
from tests.support.waiting import eventually, is_gone


@pytest.fixture
async def evaluator(tmp_path: Path) -> AsyncIterator[Evaluator]:
    async with running_evaluator(tmp_path) as running:
        yield running


async def test_capabilities(evaluator: Evaluator) -> None:
    answer = await evaluator.calls.GetCapabilities(evaluator_pb2.GetCapabilitiesRequest())
    assert answer.runtimes[0].runtime == common_pb2.RUNTIME_ONNXRUNTIME
    assert answer.platform.startswith("linux-")
    assert answer.cpu


async def test_evaluate(evaluator: Evaluator) -> None:
    request = evaluator_pb2.StartEvaluateRequest(
        key=key("e1"),
        onnx_float=evaluator.put(),
        onnx_trt=evaluator.put(high=15),
        onnx_ort=evaluator.put(high=15, unsigned=True),
        dataset=evaluator.labelled(20),
        batch_size=8,
    )
    started = (await evaluator.calls.StartEvaluate(request)).job
    assert started.kind == "evaluate"
    job, phases = await evaluator.ended("e1")
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.failure
    assert phases == ["loading", "evaluating", "timing"]
    measured = job.result.evaluation.measurements
    assert [m.form for m in measured] == [
        reports_pb2.MEASURED_FORM_FLOAT,
        reports_pb2.MEASURED_FORM_ONNX_TRT,
        reports_pb2.MEASURED_FORM_ONNX_ORT,
    ]
    assert measured[1].accuracy.top1 == measured[2].accuracy.top1
    assert measured[2].int8_layers == 2
    again = (await evaluator.calls.StartEvaluate(request)).job
    assert (again.run_id, again.state) == (job.run_id, jobs_pb2.JOB_STATE_SUCCEEDED)


async def test_failed_job_names_the_field(evaluator: Evaluator) -> None:
    outside = common_pb2.Dataset(path="../artifacts", format=common_pb2.DATASET_FORMAT_IMAGE_FOLDER)
    request = evaluator_pb2.StartEvaluateRequest(key=key("e2"), onnx_float=evaluator.put(), dataset=outside)
    await evaluator.calls.StartEvaluate(request)
    job, _ = await evaluator.ended("e2")
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    assert (job.failure.code, job.failure.field) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], "dataset.path")


async def test_request_without_data_is_refused_at_once(evaluator: Evaluator) -> None:
    request = evaluator_pb2.StartEvaluateRequest(key=key("e3"), onnx_float=evaluator.put())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await evaluator.calls.StartEvaluate(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_cancelled_within_seconds(evaluator: Evaluator) -> None:
    request = evaluator_pb2.StartEvaluateRequest(
        key=key("e4"), onnx_float=evaluator.put(), dataset=evaluator.labelled(50_000), batch_size=1
    )
    await evaluator.calls.StartEvaluate(request)
    jobs: list[int] = []
    begin = 0.0
    async for event in evaluator.jobs.WatchJob(jobs_pb2.WatchJobRequest(job_id="e4")):
        if event.job.progress.phase == "evaluating" and not jobs:
            jobs = [p.pid for p in psutil.Process().children(recursive=True) if "jobs.child" in str(p.cmdline())]
            begin = time.monotonic()
            await evaluator.jobs.CancelJob(jobs_pb2.CancelJobRequest(job_id="e4"))
    assert event.job.state == jobs_pb2.JOB_STATE_CANCELLED
    assert time.monotonic() - begin < 5
    assert jobs
    await eventually(lambda: all(is_gone(pid) for pid in jobs))


@pytest.mark.skipif(runtimes.TENSORRT_RTX.version() is None, reason="tensorrt-rtx is not installed")
async def test_build_engine(evaluator: Evaluator) -> None:
    target = common_pb2.EngineTarget(runtime=common_pb2.RUNTIME_TENSORRT_RTX, compute_capabilities=["8.6", "8.9"])
    request = evaluator_pb2.StartBuildEngineRequest(key=key("b1"), onnx_trt=evaluator.put(), target=target)
    bad = evaluator_pb2.StartBuildEngineRequest(
        key=key("b2"), onnx_trt=evaluator.put(channel_scales=True), target=target
    )
    await asyncio.gather(evaluator.calls.StartBuildEngine(request), evaluator.calls.StartBuildEngine(bad))
    (job, phases), (failed, _) = await asyncio.gather(evaluator.ended("b1"), evaluator.ended("b2"))
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.failure
    assert phases[:2] == ["checking", "building"]
    assert phases[-1] == "auditing"
    engine = job.result.engine
    assert (engine.int8_layers, engine.total_layers) == (3, 3)
    assert evaluator.store.stat(engine.manifest.engine.digest).size_bytes == engine.manifest.engine.size_bytes
    record = json.loads(evaluator.store.read_bytes(engine.manifest_file.digest))
    assert record["compute_capabilities"] == ["8.6", "8.9"]
    assert (failed.state, failed.failure.reason) == (jobs_pb2.JOB_STATE_FAILED, "LAYER_NOT_INT8")


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
async def test_an_engine_without_a_gpu_is_refused_at_once(evaluator: Evaluator) -> None:
    onnx = evaluator.put()
    manifest = reports_pb2.EngineManifest(
        engine=evaluator.store.put_bytes(b"plan"),
        onnx_digest=onnx.digest,
        runtime=common_pb2.RUNTIME_TENSORRT_RTX,
        runtime_version=runtimes.TENSORRT_RTX.version() or "1.7",
        compute_capabilities=["8.9"],
    )
    request = evaluator_pb2.StartEvaluateRequest(
        key=key("e9"), onnx_float=onnx, onnx_trt=onnx, dataset=evaluator.labelled(2), engine=manifest
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await evaluator.calls.StartEvaluate(request)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "needs an NVIDIA GPU of compute capability 8.9" in str(caught.value.details())


@pytest.mark.skipif(runtimes.TENSORRT.version() is not None, reason="tensorrt is installed")
async def test_missing_runtime_is_told_at_once(evaluator: Evaluator) -> None:
    request = evaluator_pb2.StartBuildEngineRequest(
        key=key("b3"),
        onnx_trt=evaluator.put(),
        target=common_pb2.EngineTarget(runtime=common_pb2.RUNTIME_TENSORRT),
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await evaluator.calls.StartBuildEngine(request)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "pip install tensorrt" in (caught.value.details() or "")
    status = rpc_status.from_call(cast(grpc.Call, caught.value))
    info = error_details_pb2.ErrorInfo()
    assert any(d.Unpack(info) for d in status.details)
    assert info.reason == "RUNTIME_NOT_INSTALLED"
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await evaluator.jobs.GetJob(jobs_pb2.GetJobRequest(job_id="b3"))
    assert missing.value.code() == grpc.StatusCode.NOT_FOUND


def test_server_loads_neither_torch_nor_runtimes() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'}"
    code = f"import sys, services.evaluator.server; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_jobs_run_without_torch() -> None:
    code = "import sys, services.evaluator.jobs, services.evaluator.evaluation; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


async def test_starts_alone_and_stops_on_sigterm(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    environment = {
        **os.environ,
        "GRANQ_PORT": "0",
        "GRANQ_ARTIFACT_URL": (tmp_path / "artifacts").as_uri(),
        "GRANQ_READY_FILE": str(ready),
    }
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "services.evaluator"], env=environment)
    try:
        await eventually(ready.exists)
        # Seconds of processor time, because tests share the machine with others.
        used = sum(psutil.Process(process.pid).cpu_times()[:2])
        assert used < 3, f"{used:.1f} s of processor, {time.monotonic() - begin:.1f} s in all"
        port = json.loads(ready.read_text())["port"]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            answer = await check(health_pb2.HealthCheckRequest(service="granq.v1.EvaluatorService"))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        process.terminate()
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
