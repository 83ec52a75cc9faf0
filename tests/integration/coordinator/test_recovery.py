"""Coordinators and workers that are killed, restarted, replaced and upgraded while a pipeline runs."""

import asyncio
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from services.common.errors import FailedPreconditionError
from services.coordinator.requests import Stage
from services.coordinator.transitions import State
from tests.support.coordinator import Bench, Client, CoordinatorProcess, WorkerProcess, bench
from tests.support.postgres import PostgresServer, postgres_server
from tests.support.waiting import eventually

STAGES = {
    "inspect": Stage.STAGE_VALIDATE,
    "quantize": Stage.STAGE_QUANTIZE,
    "evaluate": Stage.STAGE_EVALUATE,
}


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    made = WorkerProcess(tmp_path)
    made.start()
    yield made
    made.kill()


@pytest.fixture
def coordinator(tmp_path: Path, worker: WorkerProcess) -> Iterator[CoordinatorProcess]:
    made = CoordinatorProcess(tmp_path, worker.address)
    made.start()
    yield made
    made.kill()


@pytest.fixture
async def client(coordinator: CoordinatorProcess) -> AsyncIterator[Client]:
    made = Client(coordinator.address)
    yield made
    await made.close()


@pytest.fixture
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.mark.parametrize("kind", ["inspect", "quantize", "evaluate"])
async def test_a_killed_coordinator_attaches_to_the_running_job(
    kind: str, worker: WorkerProcess, coordinator: CoordinatorProcess, client: Client
) -> None:
    worker.script.tell(kind, stall_at=2)
    name = (await client.submit()).pipeline_id
    seen = await client.until(name, lambda event: event.stage == STAGES[kind] and event.progress.step == 2)
    coordinator.kill()
    with pytest.raises(grpc.aio.AioRpcError):
        await client.get(name)
    await asyncio.to_thread(coordinator.start)
    await client.channel.channel_ready()
    assert (await client.get(name)).state == State.PIPELINE_STATE_RUNNING
    worker.script.tell(kind)
    events = await client.follow(name, seen.sequence)
    assert events[-1].state == State.PIPELINE_STATE_SUCCEEDED
    for each in ("inspect", "synthesize", "quantize", "export", "evaluate"):
        assert len(worker.script.lines(each, "begins")) == 1, each


async def test_a_pipeline_that_waited_outlives_a_kill(tmp_path: Path, worker: WorkerProcess) -> None:
    coordinator = CoordinatorProcess(tmp_path, worker.address, max_running_pipelines="1")
    coordinator.start()
    client = Client(coordinator.address)
    try:
        worker.script.tell("inspect", stall_at=1)
        first = (await client.submit()).pipeline_id
        await client.until(first, lambda event: event.progress.step == 1)
        waiting = (await client.submit()).pipeline_id
        coordinator.kill()
        worker.script.tell("inspect")
        await asyncio.to_thread(coordinator.start)
        await client.channel.channel_ready()
        for name in (first, waiting):
            await client.finish(name)
        assert len(worker.script.lines("inspect", "begins")) == 2
    finally:
        await client.close()
        coordinator.kill()


async def test_a_killed_worker_resumes_its_job_after_its_restart(
    worker: WorkerProcess, coordinator: CoordinatorProcess, client: Client
) -> None:
    worker.script.tell("quantize", stall_at=3)
    name = (await client.submit()).pipeline_id
    at_three = await client.until(name, lambda event: event.stage == Stage.STAGE_QUANTIZE and event.progress.step == 3)
    worker.kill()
    told = await client.until(name, lambda event: event.HasField("failure"), at_three.sequence)
    assert told.state == State.PIPELINE_STATE_RUNNING
    worker.script.tell("quantize")
    await asyncio.to_thread(worker.start)
    await client.finish(name)
    assert len(worker.script.lines("quantize", "resumes_at_3")) == 1
    assert len(worker.script.lines("synthesize", "begins")) == 1


async def test_a_watcher_is_sent_away_at_a_graceful_stop_and_goes_on_later(
    worker: WorkerProcess, coordinator: CoordinatorProcess, client: Client
) -> None:
    worker.script.tell("inspect", stall_at=1)
    name = (await client.submit()).pipeline_id
    last = 0

    async def watch() -> None:
        nonlocal last
        async for event in client.watch(name):
            last = event.sequence

    watcher = asyncio.create_task(watch())
    await client.until(name, lambda event: event.progress.step == 1)
    began = time.monotonic()
    assert await asyncio.to_thread(coordinator.stop) == 0
    assert time.monotonic() - began < 8
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await watcher
    assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
    await asyncio.to_thread(coordinator.start)
    await client.channel.channel_ready()
    worker.script.tell("inspect")
    await client.follow(name, last)
    assert len(worker.script.lines("inspect", "begins")) == 1


async def test_ready_quickly_idle_and_without_torch(coordinator: CoordinatorProcess) -> None:
    coordinator.stop()
    await asyncio.to_thread(coordinator.start)
    process = psutil.Process(coordinator.pid)
    # Processor time, not wall time: a loaded test machine must not decide.
    assert sum(process.cpu_times()[:2]) < 5
    maps = {Path(region.path).name for region in process.memory_maps()}
    assert not any(name.startswith("libtorch") for name in maps)
    with urllib.request.urlopen(f"http://127.0.0.1:{coordinator.metrics_port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'granq_pipelines{state="running"} 0.0' in text
    assert "granq_pipeline_queue_depth 0.0" in text


async def test_a_second_coordinator_with_the_same_id_is_refused(tmp_path: Path) -> None:
    async with bench(tmp_path) as running:
        other = Bench(tmp_path, running.database_url)
        with pytest.raises(FailedPreconditionError, match="executor_id"):
            await other.start_coordinator(lock_seconds=0.2)


@pytest.mark.parametrize("change", [{"application_version": "next"}, {"executor_id": "its-successor"}])
async def test_another_version_or_executor_takes_a_lost_pipeline_over(tmp_path: Path, change: dict[str, str]) -> None:
    async with bench(tmp_path) as running:
        assert running.client is not None
        running.script.tell("quantize", stall_at=2)
        name = (await running.client.submit()).pipeline_id
        await running.client.until(name, lambda event: event.stage == Stage.STAGE_QUANTIZE and event.progress.step == 2)
        await running.stop_coordinator()
        client = await running.start_coordinator(**change)
        await client.until(name, lambda event: event.failure.reason == "COORDINATOR_CHANGED")
        running.script.tell("quantize")
        await client.finish(name)
        assert len(running.script.lines("synthesize", "begins")) == 1
        assert len(running.script.lines("quantize", "begins")) == 1


async def test_a_cancellation_that_a_crash_interrupted_is_carried_through(tmp_path: Path) -> None:
    async with bench(tmp_path) as running:
        assert running.client is not None
        assert running.coordinator is not None
        running.script.tell("inspect", stall_at=1)
        name = (await running.client.submit()).pipeline_id
        await running.client.until(name, lambda event: event.progress.step == 1)
        await running.stop_coordinator()
        # What the database looks like when the process dies right after the request was noted.
        running.coordinator._transitions.request_cancel(name)
        client = await running.start_coordinator()
        await client.finish(name, State.PIPELINE_STATE_CANCELLED)


async def test_a_job_that_outlived_its_cancelled_pipeline_is_ended_later(tmp_path: Path, worker: WorkerProcess) -> None:
    worker.script.tell("inspect", stall_at=1)
    coordinator = CoordinatorProcess(tmp_path, worker.address, sweep_seconds="0.3", cancel_seconds="0.5").start()
    client = Client(coordinator.address)
    try:
        name = (await client.submit()).pipeline_id
        await client.until(name, lambda event: event.progress.step == 1)
        frozen = psutil.Process(worker.pid)
        frozen.suspend()  # the server does not answer, while the job's own process goes on
        await client.cancel(name)
        await client.finish(name, State.PIPELINE_STATE_CANCELLED)
        frozen.resume()
        assert worker.children()
        await eventually(lambda: not worker.children())
    finally:
        await client.close()
        coordinator.kill()


async def test_a_pipeline_runs_on_postgresql(tmp_path: Path, postgres: PostgresServer) -> None:
    async with bench(tmp_path, postgres.url) as running:
        assert running.client is not None
        running.script.tell("synthesize", stall_at=2)
        name = (await running.client.submit()).pipeline_id
        await running.client.until(
            name, lambda event: event.progress.step == 2 and event.stage == Stage.STAGE_SYNTHESIZE
        )
        await running.stop_coordinator()
        client = await running.start_coordinator()
        running.script.tell("synthesize")
        pipeline = await client.finish(name)
        assert pipeline.results.HasField("bundle")
        for kind in ("inspect", "synthesize", "quantize", "export", "evaluate"):
            assert len(running.script.lines(kind, "begins")) == 1


async def test_two_coordinators_share_a_database_and_one_inherits_from_the_other(
    tmp_path: Path, worker: WorkerProcess, postgres: PostgresServer
) -> None:
    pair = [
        CoordinatorProcess(
            tmp_path, worker.address, name, database_url=postgres.url, executor_id=name, sweep_seconds="0.5"
        )
        for name in ("pod-0", "pod-1")
    ]
    for each in pair:
        await asyncio.to_thread(each.start)
    first, second = (Client(each.address) for each in pair)
    try:
        worker.script.tell("quantize", stall_at=2)
        name, cancelled = [(await first.submit()).pipeline_id for _ in range(2)]
        # Events of one coordinator reach the watchers of the other.
        await second.until(name, lambda event: event.stage == Stage.STAGE_QUANTIZE and event.progress.step == 2)
        asked = time.monotonic()
        await second.cancel(cancelled)
        await second.finish(cancelled, State.PIPELINE_STATE_CANCELLED)
        assert time.monotonic() - asked < 6
        pair[0].kill()
        told = await second.until(name, lambda event: event.HasField("failure"))
        assert told.failure.reason == "COORDINATOR_CHANGED"
        worker.script.tell("quantize")
        await second.finish(name)
        assert sum(job.startswith(name) for job in worker.script.lines("quantize", "begins")) == 1
    finally:
        for client in (first, second):
            await client.close()
        for each in pair:
            each.kill()


async def test_a_pipeline_outlives_a_restart_of_the_database(
    tmp_path: Path, worker: WorkerProcess, postgres: PostgresServer
) -> None:
    coordinator = CoordinatorProcess(tmp_path, worker.address, database_url=postgres.url, sweep_seconds="1")
    await asyncio.to_thread(coordinator.start)
    client = Client(coordinator.address)
    try:
        worker.script.tell("quantize", stall_at=2)
        name = (await client.submit()).pipeline_id
        await client.until(name, lambda event: event.stage == Stage.STAGE_QUANTIZE and event.progress.step == 2)
        await asyncio.to_thread(postgres.stop)
        worker.script.tell("quantize")  # the stage ends while nothing can be written
        with pytest.raises(grpc.aio.AioRpcError) as away:
            await client.get(name)
        assert away.value.code() == grpc.StatusCode.UNAVAILABLE
        await asyncio.to_thread(postgres.start)
        await client.finish(name)
        for kind in ("inspect", "synthesize", "quantize", "export", "evaluate"):
            assert len(worker.script.lines(kind, "begins")) == 1, kind
    finally:
        await client.close()
        coordinator.kill()
