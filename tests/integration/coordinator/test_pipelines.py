"""Pipelines from submission to report through real servers on loopback, the workers' jobs being scripted."""

import asyncio
import json
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from granq.v1 import common_pb2, coordinator_pb2, reports_pb2
from services.coordinator.requests import Stage
from services.coordinator.transitions import State
from tests.support.coordinator import Bench, Client, bench
from tests.support.pipelines import spec

FLOAT, SIMULATED = reports_pb2.MEASURED_FORM_FLOAT, reports_pb2.MEASURED_FORM_SIMULATED
TRT, ORT = reports_pb2.MEASURED_FORM_ONNX_TRT, reports_pb2.MEASURED_FORM_ONNX_ORT


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path) as made:
        yield made


@pytest.fixture
def client(running: Bench) -> Client:
    assert running.client is not None
    return running.client


async def _full_spec(client: Client) -> coordinator_pb2.PipelineSpec:
    made = spec(await client.upload(b"model"))
    made.dataset.CopyFrom(common_pb2.Dataset(path="fashion", format=common_pb2.DATASET_FORMAT_IDX))
    made.engines.add(runtime=common_pb2.RUNTIME_TENSORRT)
    made.engines.add(runtime=common_pb2.RUNTIME_TENSORRT_RTX)
    return made


async def test_a_pipeline_runs_through_all_stages_to_its_report(running: Bench, client: Client) -> None:
    submitted = await client.submit(await _full_spec(client))
    assert submitted.state == State.PIPELINE_STATE_QUEUED
    events = await client.follow(submitted.pipeline_id)
    stages = [event.stage for event in events]
    assert sorted(set(stages)) == list(range(8))
    assert stages == sorted(stages)
    assert {event.progress.phase for event in events if event.stage == Stage.STAGE_BUILD_ENGINES} >= {
        "engine 1 of 2: working",
        "engine 2 of 2: working",
    }
    pipeline = await client.get(submitted.pipeline_id)
    assert pipeline.last_sequence == events[-1].sequence
    results = pipeline.results
    assert [row.form for row in results.evaluation.measurements] == [FLOAT, SIMULATED, TRT, ORT]
    assert [outcome.WhichOneof("outcome") for outcome in results.engines] == ["failure", "engine"]
    assert results.engines[0].failure.reason == "RUNTIME_MISSING"
    (unmeasured,) = results.evaluation.unmeasured
    assert (unmeasured.target, unmeasured.failure.reason) == ("2", "ENGINE_FOREIGN")
    report = json.loads(await client.download(results.report.digest))
    assert report["pipeline_id"] == pipeline.pipeline_id
    bundle = running.folder / "bundle.zip"
    bundle.write_bytes(await client.download(results.bundle.digest))
    with zipfile.ZipFile(bundle) as archive:
        assert "engines/2_tensorrt_rtx.engine" in archive.namelist()
        assert archive.read("model_trt.onnx") == b"onnx_trt"
    for kind in ("inspect", "synthesize", "quantize", "export", "evaluate", "simulate"):
        assert len(running.script.lines(kind, "begins")) == 1


async def test_simulation_only_skips_graphs_and_engines(running: Bench, client: Client) -> None:
    made = await _full_spec(client)
    made.quantization.activation_granularity = common_pb2.ACTIVATION_GRANULARITY_PER_SAMPLE_CHANNEL
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.submit(made)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    del made.engines[:]
    pipeline = await client.finish((await client.submit(made)).pipeline_id)
    assert [row.form for row in pipeline.results.evaluation.measurements] == [FLOAT, SIMULATED]
    assert not pipeline.results.HasField("export")
    assert running.script.lines("export", "begins") == running.script.lines("evaluate", "begins") == []


async def test_equal_requests_start_one_pipeline(running: Bench, client: Client) -> None:
    made = spec(await client.upload(b"model"))
    found = await asyncio.gather(*(client.submit(made, "once") for _ in range(6)))
    assert len({pipeline.pipeline_id for pipeline in found}) == 1
    made.quantization.weight_bits = 3
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.submit(made, "once")
    assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS
    await client.finish(found[0].pipeline_id)
    assert len(running.script.lines("inspect", "begins")) == 1


async def test_a_failed_stage_is_retried_and_the_others_are_not(running: Bench, client: Client) -> None:
    running.script.tell("quantize", fail={"code": 8, "reason": "OUT_OF_MEMORY", "message": "use a smaller batch"})
    name = (await client.submit()).pipeline_id
    failed = await client.finish(name, State.PIPELINE_STATE_FAILED)
    assert failed.stage == Stage.STAGE_QUANTIZE
    assert (failed.failure.code, failed.failure.reason) == (8, "OUT_OF_MEMORY")
    assert failed.results.HasField("synthesis")
    running.script.tell("quantize")
    retried = await client.retry(name)
    assert retried.state == State.PIPELINE_STATE_QUEUED
    events = await client.follow(name, failed.last_sequence)
    assert Stage.STAGE_SYNTHESIZE not in {event.stage for event in events[1:]}
    assert (await client.get(name)).state == State.PIPELINE_STATE_SUCCEEDED
    assert len(running.script.lines("synthesize", "begins")) == 1
    assert len(running.script.lines("quantize", "begins")) == 2
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.retry(name)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_cancel_ends_the_running_job_and_retry_resumes_it(running: Bench, client: Client) -> None:
    running.script.tell("quantize", stall_at=3)
    name = (await client.submit()).pipeline_id
    await client.until(name, lambda event: event.stage == Stage.STAGE_QUANTIZE and event.progress.step == 3)
    asked = time.monotonic()
    assert (await client.cancel(name)).state == State.PIPELINE_STATE_CANCELLING
    cancelled = await client.finish(name, State.PIPELINE_STATE_CANCELLED)
    assert time.monotonic() - asked < 5
    assert (await client.cancel(name)).state == State.PIPELINE_STATE_CANCELLED
    assert running.script.lines("quantize", "ends") == []
    running.script.tell("quantize")
    await client.retry(name)
    await client.follow(name, cancelled.last_sequence)
    assert (await client.get(name)).state == State.PIPELINE_STATE_SUCCEEDED
    assert len(running.script.lines("quantize", "resumes_at_3")) == 1


async def test_cancel_takes_effect_while_the_worker_is_away(running: Bench, client: Client) -> None:
    running.script.tell("inspect", stall_at=1)
    name = (await client.submit()).pipeline_id
    await client.until(name, lambda event: event.progress.step == 1)
    await running.worker.stop(0)
    await client.until(name, lambda event: event.HasField("failure"))
    asked = time.monotonic()
    await client.cancel(name)
    await client.finish(name, State.PIPELINE_STATE_CANCELLED)
    assert time.monotonic() - asked < 5


async def test_a_crashing_job_is_resumed_and_told(running: Bench, client: Client) -> None:
    running.script.tell("synthesize", crash_at=2)
    name = (await client.submit()).pipeline_id
    events = await client.follow(name)
    assert events[-1].state == State.PIPELINE_STATE_SUCCEEDED
    assert [event.failure.reason for event in events if event.HasField("failure")] == ["JOB_PROCESS_DIED"]
    assert len(running.script.lines("synthesize", "resumes_at_2")) == 1


async def test_a_job_that_always_crashes_fails_the_pipeline(running: Bench, client: Client) -> None:
    running.script.tell("synthesize", crash_at=2, crash_always=True)
    failed = await client.finish((await client.submit()).pipeline_id, State.PIPELINE_STATE_FAILED)
    assert failed.failure.reason == "JOB_PROCESS_DIED"
    assert len(running.script.lines("synthesize", "crashes")) == 3


async def test_an_engine_that_breaks_fails_the_pipeline(running: Bench, client: Client) -> None:
    running.script.tell("build_engine", refuse={"code": 3, "reason": "BAD_TARGET", "message": "no", "field": "target"})
    failed = await client.finish(
        (await client.submit(await _full_spec(client))).pipeline_id, State.PIPELINE_STATE_FAILED
    )
    assert (failed.stage, failed.failure.field) == (Stage.STAGE_BUILD_ENGINES, "target")


async def test_a_failed_measurement_fails_the_pipeline(running: Bench, client: Client) -> None:
    running.script.tell("evaluate", fail={"code": 3, "reason": "BAD_DATASET", "message": "no labels"})
    name = (await client.submit(await _full_spec(client))).pipeline_id
    failed = await client.finish(name, State.PIPELINE_STATE_FAILED)
    assert (failed.stage, failed.failure.reason) == (Stage.STAGE_EVALUATE, "BAD_DATASET")
    assert running.script.lines("simulate", "begins") == []


async def test_ended_pipelines_are_deleted_and_running_ones_are_not(running: Bench, client: Client) -> None:
    running.script.tell("inspect", stall_at=0)
    name = (await client.submit()).pipeline_id
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.delete(name)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    running.script.tell("inspect")
    await client.finish(name)
    await client.delete(name)
    for call in (client.get(name), client.delete(name), client.cancel(name), client.retry(name), client.follow(name)):
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await call
        assert missing.value.code() == grpc.StatusCode.NOT_FOUND


async def test_pages_list_everything_once(running: Bench, client: Client) -> None:
    running.script.tell("inspect", stall_at=0)
    made = spec(await client.upload(b"model"))
    names = [(await client.submit(made)).pipeline_id for _ in range(5)]
    seen: list[str] = []
    request = coordinator_pb2.ListPipelinesRequest(page_size=2)
    while True:
        page = await client.pipelines.ListPipelines(request, timeout=30)
        seen += [pipeline.pipeline_id for pipeline in page.pipelines]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
        await client.submit(made)  # newer than every page to come
    assert seen == names[::-1]
    only = coordinator_pb2.ListPipelinesRequest(page_size=2, states=[State.PIPELINE_STATE_SUCCEEDED])
    assert not (await client.pipelines.ListPipelines(only, timeout=30)).pipelines
    for token in ("nonsense", request.page_token):
        only.page_token = token
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.pipelines.ListPipelines(only, timeout=30)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_artifacts_travel_both_ways_and_wrong_ones_are_refused(running: Bench, client: Client) -> None:
    content = bytes(range(256)) * 10_000
    stored = await client.upload(content, chunk=300_000, name="model.pt2", size_bytes=len(content))
    assert await client.download(stored.digest) == content
    assert await client.download(stored.digest, 1_234_567) == content[1_234_567:]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.upload(content, digest="sha256:" + "0" * 64)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    path = running.store.local_path(stored.digest)
    path.chmod(0o644)
    path.write_bytes(content[:-1] + b"X")
    with pytest.raises(grpc.aio.AioRpcError) as damaged:
        await client.download(stored.digest)
    assert damaged.value.code() == grpc.StatusCode.DATA_LOSS


async def test_submit_refuses_a_model_that_is_not_stored(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.submit(spec())
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert "upload it first" in str(refused.value.details())


async def test_a_watch_goes_on_where_it_was_left(client: Client) -> None:
    name = (await client.submit()).pipeline_id
    whole = await client.follow(name)
    assert await client.follow(name, 4) == whole[4:]
