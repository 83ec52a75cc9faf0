"""A worker that nobody uses retires; one that is used, in whichever way, does not. One may be for a single pipeline."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from granq.v1 import common_pb2, generator_pb2, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import ResourceExhaustedError, UnavailableError
from services.common.jobs import JobManager
from services.common.jobs.usage import Usage
from services.common.settings import ServerSettings
from tests.support import job_functions

pytestmark = pytest.mark.timeout(60)
KINDS = {name: f"{job_functions.__name__}:{name}" for name in ("count", "until_told")}
IDLE = 0.1


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[JobManager]:
    settings = ServerSettings(artifact_url=(tmp_path / "store").as_uri(), cache_dir=tmp_path)
    manager = JobManager(ArtifactStore(settings.artifact_url), settings, KINDS, max_running=1)
    yield manager
    await manager.close(0)


async def start(manager: JobManager, kind: str, job_id: str, pipeline_id: str = "") -> jobs_pb2.Job:
    request = generator_pb2.StartSynthesizeRequest(
        key=jobs_pb2.JobKey(job_id=job_id, pipeline_id=pipeline_id), model=common_pb2.ModelSource(architecture=kind)
    )
    return await manager.start(kind, request.key, request)


async def test_the_time_begins_anew_with_each_use() -> None:
    usage = Usage()
    began = time.monotonic()
    waiting = asyncio.create_task(usage.unused(0.1))
    for _ in range(3):
        with usage.used(), usage.used():
            # Longer than the time alone would last.
            assert not (await asyncio.wait({waiting}, timeout=0.15))[0]
        last = time.monotonic()
    await waiting
    assert time.monotonic() - last >= 0.1
    assert time.monotonic() - began >= 0.55


async def test_a_worker_that_never_had_a_job_retires_and_takes_none(manager: JobManager) -> None:
    await manager.retire(IDLE)
    with pytest.raises(UnavailableError, match="about to end"):
        await start(manager, "count", "late")


async def test_a_worker_retires_after_its_last_job_was_read(manager: JobManager, tmp_path: Path) -> None:
    retiring = asyncio.create_task(manager.retire(IDLE))
    await start(manager, "until_told", "a")
    events = manager.watch("a")
    assert (await anext(events)).job.state == jobs_pb2.JOB_STATE_QUEUED
    assert not (await asyncio.wait({retiring}, timeout=5 * IDLE))[0], "while the job runs"
    (tmp_path / "told").touch()
    while (job := (await anext(events)).job).state != jobs_pb2.JOB_STATE_SUCCEEDED:
        pass
    # Whoever reads slowly still reads: the stream has not ended.
    assert not (await asyncio.wait({retiring}, timeout=5 * IDLE))[0], "while the job is watched"
    assert [event async for event in events] == []
    await asyncio.wait_for(retiring, 10)
    assert (await manager.get("a")).result == job.result


async def test_a_worker_of_one_pipeline_refuses_others(tmp_path: Path) -> None:
    settings = ServerSettings(artifact_url=(tmp_path / "store").as_uri(), cache_dir=tmp_path, single_pipeline=True)
    manager = JobManager(ArtifactStore(settings.artifact_url), settings, KINDS, max_running=1)
    try:
        await start(manager, "count", "a", "first")
        with pytest.raises(ResourceExhaustedError, match="later") as refused:
            await start(manager, "count", "b", "second")
        assert refused.value.reason == "WORKER_BUSY"
        await start(manager, "count", "c", "first")
        for job_id in ("a", "c"):
            ends = [event.job.state async for event in manager.watch(job_id)]
            assert ends[-1] == jobs_pb2.JOB_STATE_SUCCEEDED
        with pytest.raises(ResourceExhaustedError):
            await start(manager, "count", "b", "second")
    finally:
        await manager.close(0)
