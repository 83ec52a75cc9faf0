"""Deadlines and priorities of pipelines through real servers."""

import asyncio
from pathlib import Path

import grpc

from granq.v1 import coordinator_pb2
from services.coordinator.requests import Stage
from services.coordinator.transitions import State
from tests.support.coordinator import Client, bench
from tests.support.pipelines import spec


async def _submit(client: Client, *, priority: int = 0, seconds: int = 0) -> str:
    made = spec(await client.upload(b"model"))
    made.priority = priority
    if seconds:
        made.max_duration.FromSeconds(seconds)
    return (await client.submit(made)).pipeline_id


async def _failed(client: Client, pipeline_id: str) -> coordinator_pb2.Pipeline:
    pipeline = await client.finish(pipeline_id, State.PIPELINE_STATE_FAILED)
    assert pipeline.failure.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert pipeline.failure.reason == "PIPELINE_DEADLINE"
    return pipeline


async def test_a_pipeline_whose_time_is_up_ends_with_its_job_and_can_go_on(tmp_path: Path) -> None:
    async with bench(tmp_path) as running:
        assert running.client is not None
        running.script.tell("quantize", stall_at=2)
        name = await _submit(running.client, seconds=15)
        await running.client.until(name, lambda event: event.stage == Stage.STAGE_QUANTIZE and event.progress.step == 2)
        pipeline = await _failed(running.client, name)
        assert pipeline.stage == Stage.STAGE_QUANTIZE
        # The job is stopped after that was told. If it went on before, it would end and leave nothing to resume.
        async with asyncio.timeout(20):
            while not running.script.lines("quantize", "is_cancelled"):
                await asyncio.sleep(0.01)
        assert not running.script.lines("quantize", "ends")
        running.script.tell("quantize")
        await running.client.retry(name)
        await running.client.until(name, lambda event: event.state == State.PIPELINE_STATE_SUCCEEDED)
        assert len(running.script.lines("quantize", "resumes_at_2")) == 1
        assert len(running.script.lines("synthesize", "begins")) == 1


async def test_waiting_pipelines_fail_in_time_and_go_by_priority(tmp_path: Path) -> None:
    async with bench(tmp_path, max_running_pipelines=1, sweep_seconds=0.3) as running:
        client = running.client
        assert client is not None
        running.script.tell("inspect", stall_at=1)
        first = await _submit(client)
        await client.until(first, lambda event: event.progress.step == 1)
        late = await _submit(client, seconds=1)
        low, high = await _submit(client, priority=-1), await _submit(client, priority=1)
        assert (await _failed(client, late)).stage == Stage.STAGE_UNSPECIFIED
        running.script.tell("inspect")
        for name in (first, low, high):
            await client.finish(name)
        begun = [(await client.get(name)).start_time.ToMicroseconds() for name in (first, high, low)]
        assert begun == sorted(begun)
        assert not any(job.startswith(late) for job in running.script.lines("inspect", "begins"))
