"""A worker as Kubernetes runs it as a Job: it ends by itself, with exit code 0, when there is nothing left to do."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from granq.v1 import artifacts_pb2, common_pb2, jobs_pb2, quantizer_pb2
from services.common.errors import UnavailableError
from services.common.rpc.worker_client import WorkerClient
from services.common.security import SecuritySettings
from tests.support.coordinator import WorkerProcess
from tests.support.servers import ServerProcess

pytestmark = pytest.mark.timeout(60)
IDLE = 0.4


@asynccontextmanager
async def connected(server: ServerProcess) -> AsyncIterator[WorkerClient]:
    client = WorkerClient(
        "quantizer",
        server.address,
        SecuritySettings(),
        max_message_bytes=2**22,
        timeout_seconds=20,
        watch_timeout_seconds=60,
    )
    try:
        yield client
    finally:
        await client.close()


def request(job_id: str) -> quantizer_pb2.StartInspectRequest:
    model = common_pb2.ModelSource(artifact=artifacts_pb2.Artifact(digest="sha256:" + "0" * 64))
    return quantizer_pb2.StartInspectRequest(key=jobs_pb2.JobKey(job_id=job_id, pipeline_id="p"), model=model)


async def end_of(client: WorkerClient, job_id: str) -> jobs_pb2.Job:
    return [event.job async for event in client.watch(job_id, "", 0)][-1]


async def test_a_worker_ends_after_its_last_job_whose_result_the_next_one_has(tmp_path: Path) -> None:
    settings = {"exit_when_idle_seconds": str(IDLE), "max_running_jobs": "1"}
    first = WorkerProcess(tmp_path, "first", **settings)
    script = first.script
    script.tell("inspect", stall_at=2)
    first.start()
    try:
        async with connected(first) as client:
            for job_id in ("runs", "waits"):
                await client.start(request(job_id))
            # Nobody calls now; one job runs, and one waits.
            with pytest.raises(subprocess.TimeoutExpired):
                await asyncio.to_thread(first.wait, 3 * IDLE)
            script.tell("inspect")
            ends = [await end_of(client, job_id) for job_id in ("runs", "waits")]
            assert [job.state for job in ends] == [jobs_pb2.JOB_STATE_SUCCEEDED] * 2
            assert await asyncio.to_thread(first.wait, 20) == 0
            with pytest.raises(UnavailableError):
                await client.get("runs")
    finally:
        first.kill_if_alive()
    assert '"reason": "IDLE"' in first.log
    second = WorkerProcess(tmp_path, "second").start()
    try:
        async with connected(second) as client:
            for job in ends:
                assert await client.get(job.key.job_id) == job
                assert (await client.start(request(job.key.job_id))).result == job.result
    finally:
        assert second.stop() == 0
    assert sorted(script.lines("inspect", "begins")) == ["runs", "waits"], "each ran once"
