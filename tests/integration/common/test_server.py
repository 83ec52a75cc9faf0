"""A worker's server as a process of its own: ready, asked, stopped and killed."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from granq.v1 import artifacts_pb2, common_pb2, generator_pb2, generator_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from services.common.errors import UnavailableError
from services.common.rpc import GrpcServer
from services.common.settings import ServerSettings
from tests.support.waiting import eventually, is_gone

pytestmark = pytest.mark.timeout(90)
ROOT = Path(__file__).resolve().parents[3]
COMMAND = (sys.executable, "-m", "tests.support.job_server")


@dataclass
class Running:
    """A server's process and a channel to it."""

    process: asyncio.subprocess.Process
    ready: dict[str, Any]
    channel: grpc.aio.Channel
    log: asyncio.Task[list[dict[str, Any]]]

    @property
    def jobs(self) -> Any:
        return jobs_pb2_grpc.JobServiceStub(self.channel)

    async def start(self, kind: str, job_id: str = "a", iterations: int = 0) -> jobs_pb2.Job:
        request = generator_pb2.StartSynthesizeRequest(
            key=jobs_pb2.JobKey(job_id=job_id, pipeline_id="p1"),
            model=common_pb2.ModelSource(
                artifact=artifacts_pb2.Artifact(digest="sha256:" + "0" * 64), architecture=kind
            ),
            synthesis=common_pb2.SynthesisConfig(iterations=iterations),
        )
        stub: Any = generator_pb2_grpc.GeneratorServiceStub(self.channel)
        job: jobs_pb2.Job = (await stub.StartSynthesize(request)).job
        return job

    async def watch(self, job_id: str = "a") -> AsyncIterator[jobs_pb2.Job]:
        async for event in self.jobs.WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id)):
            yield event.job

    async def job_pid(self) -> int:
        async for job in self.watch():
            if job.HasField("progress"):
                return job.progress.step
        raise AssertionError("no progress")


async def records(stream: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    while line := await stream.readline():
        yield json.loads(line) if line.startswith(b"{") else {"event": line.decode()}


@pytest.fixture
async def launch(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Running]]]:
    launched: list[Running] = []

    async def make(**changes: str) -> Running:
        environment = {
            **os.environ,
            "GRANQ_PORT": "0",
            "GRANQ_ARTIFACT_URL": (tmp_path / "store").as_uri(),
            "GRANQ_LOG_FORMAT": "json",
            "GRANQ_GRACE_SECONDS": "2",
            **changes,
        }
        process = await asyncio.create_subprocess_exec(
            *COMMAND, cwd=ROOT, env=environment, stderr=asyncio.subprocess.PIPE
        )
        assert process.stderr is not None
        log = records(process.stderr)
        ready = await anext(record async for record in log if record["event"] == "server ready")

        async def rest() -> list[dict[str, Any]]:
            return [record async for record in log]

        channel = grpc.aio.insecure_channel(f"127.0.0.1:{ready['port']}")
        launched.append(Running(process, ready, channel, asyncio.create_task(rest())))
        return launched[-1]

    yield make
    for running in launched:
        await running.channel.close(None)
        if running.process.returncode is None:
            running.process.kill()
        await running.process.wait()
        running.log.cancel()


@pytest.fixture
async def server(launch: Callable[..., Awaitable[Running]]) -> Running:
    return await launch()


async def test_health_reflection_and_metrics(server: Running) -> None:
    check: Any = health_pb2_grpc.HealthStub(server.channel).Check
    for service in ("", "granq.v1.JobService", "granq.v1.GeneratorService"):
        answer = await check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    call: Any = reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {"granq.v1.JobService", "granq.v1.GeneratorService", "grpc.health.v1.Health"} <= names
    await server.start("count", iterations=3)
    end = [job async for job in server.watch()][-1]
    assert end.state == jobs_pb2.JOB_STATE_SUCCEEDED
    text = await asyncio.to_thread(_metrics, server.ready["metrics_port"])
    for line in (
        'grpc_server_handled_total{grpc_code="OK",grpc_method="StartSynthesize",'
        'grpc_service="granq.v1.GeneratorService",grpc_type="unary"} 1.0',
        'grpc_server_handled_total{grpc_code="INTERNAL",grpc_method="StartSynthesize",'
        'grpc_service="granq.v1.GeneratorService",grpc_type="unary"} 0.0',
        'granq_jobs_total{kind="count",outcome="succeeded"} 1.0',
        'granq_jobs_running{kind="count"} 0.0',
        'granq_job_duration_seconds_count{kind="count",outcome="succeeded"} 1.0',
        'granq_job_process_deaths_total{kind="count"} 0.0',
        'granq_job_resident_memory_bytes{kind="count"} 0.0',
        'granq_job_wait_seconds_count{kind="count"} 1.0',
        'granq_job_queue_oldest_seconds{kind="count"} 0.0',
        'granq_artifact_bytes_total{direction="write"} 10.0',
        'granq_artifact_operations_total{operation="write"}',
        'granq_build_info{python="',
        'granq_disk_free_bytes{volume="artifacts"}',
    ):
        assert line in text
    # A job that trains shows its figures; one that has ended does not.
    assert "granq_training_loss{" not in text
    assert "granq_training_iterations_per_second{" not in text
    cpu = next(line for line in text.splitlines() if line.startswith('granq_job_cpu_seconds_total{kind="count"}'))
    assert float(cpu.split()[-1]) > 0


def _metrics(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text: str = answer.read().decode()
        return text


async def test_job_service(server: Running) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.jobs.GetJob(jobs_pb2.GetJobRequest(job_id="nothing"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        assert [job async for job in server.watch("no/id")]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    started = await server.start("until_cancelled")
    assert await server.job_pid()
    assert (await server.jobs.GetJob(jobs_pb2.GetJobRequest(job_id="a"))).job.run_id == started.run_id
    assert [job.key.job_id for job in (await server.jobs.ListJobs(jobs_pb2.ListJobsRequest())).jobs] == ["a"]
    await server.jobs.CancelJob(jobs_pb2.CancelJobRequest(job_id="a"))
    assert [job async for job in server.watch()][-1].state == jobs_pb2.JOB_STATE_CANCELLED


@pytest.mark.parametrize("kind", ["until_cancelled", "never_checks"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_server_and_job(server: Running, kind: str, number: int) -> None:
    await server.start(kind)
    pid = await server.job_pid()
    events = server.watch()
    await anext(events)
    watch = asyncio.ensure_future(_all(events))
    began = time.monotonic()
    server.process.send_signal(number)
    assert await asyncio.wait_for(server.process.wait(), 15) == 0
    assert time.monotonic() - began < 5
    assert is_gone(pid)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await watch
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    log = await server.log
    assert [record["outcome"] for record in log if record["event"] == "job ended"] == ["interrupted"]
    assert log[-1]["event"] == "server stopped"
    assert not [record for record in log if "exception" in record]


async def _all(jobs: AsyncIterator[jobs_pb2.Job]) -> list[jobs_pb2.Job]:
    return [job async for job in jobs]


@pytest.mark.parametrize("stopped", [False, True])
async def test_job_dies_with_a_killed_server(server: Running, stopped: bool) -> None:
    await server.start("never_checks")
    pid = await server.job_pid()
    assert not is_gone(pid)
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    server.process.kill()
    await server.process.wait()
    await eventually(lambda: is_gone(pid), seconds=10)


async def test_next_server_resumes_from_the_checkpoint(launch: Callable[..., Awaitable[Running]]) -> None:
    first = await launch()
    await first.start("dies_once", iterations=10)
    assert [job async for job in first.watch()][-1].failure.reason == "JOB_PROCESS_DIED"
    first.process.kill()
    await first.process.wait()
    second = await launch()
    await second.start("dies_once", iterations=10)
    result = [job async for job in second.watch()][-1].result.synthesis
    assert (result.num_images, result.seconds) == (10, 2)


async def test_light(server: Running) -> None:
    process = psutil.Process(server.process.pid)
    assert not any("torch" in mapped.path for mapped in process.memory_maps())
    # Time of the CPU, not of the wall, so that a busy machine does not matter.
    before, began = process.cpu_times(), time.monotonic()
    assert before.user + before.system < 1.0, "ready within a second"
    await asyncio.sleep(2)
    after, seconds = process.cpu_times(), time.monotonic() - began
    assert (after.user + after.system - before.user - before.system) / seconds <= 0.01, "idle"


@pytest.mark.parametrize("module", ["services.common.rpc", "services.common.jobs.child", "services.common.artifacts"])
async def test_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'numpy', 'fsspec', 'onnx') if m in sys.modules])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.decode().strip() == "[]"


async def test_taken_port_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for settings in (
            ServerSettings(port=port, metrics_port=0, artifact_url=tmp_path.as_uri()),
            ServerSettings(port=0, metrics_port=port, artifact_url=tmp_path.as_uri()),
        ):
            with pytest.raises(UnavailableError, match=str(port)):
                await GrpcServer("test", settings).start()


async def test_second_signal_ends_the_grace(launch: Callable[..., Awaitable[Running]]) -> None:
    server = await launch(GRANQ_GRACE_SECONDS="600")
    await server.start("never_checks")
    pid = await server.job_pid()
    check: Any = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(service=""))
    assert (await check.read()).status == health_pb2.HealthCheckResponse.SERVING
    server.process.send_signal(signal.SIGTERM)
    # The first signal was taken once the server no longer serves; two at once would be one.
    assert (await check.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    server.process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(server.process.wait(), 20) == 0
    assert is_gone(pid)


async def test_server_that_cannot_start_says_why_and_exits(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = {**os.environ, "GRANQ_PORT": str(taken.getsockname()[1]), "GRANQ_METRICS_PORT": "0"}
        environment |= {"GRANQ_ARTIFACT_URL": tmp_path.as_uri(), "GRANQ_LOG_FORMAT": "json"}
        process = await asyncio.create_subprocess_exec(
            *COMMAND, cwd=ROOT, env=environment, stderr=asyncio.subprocess.PIPE
        )
        _, errors = await process.communicate()
    assert process.returncode == 1
    record = json.loads(errors.splitlines()[-1])
    assert (record["event"], record["reason"]) == ("server cannot start", "PORT_TAKEN")
    assert b"Traceback" not in errors


async def test_ready_file_says_the_ports(launch: Callable[..., Awaitable[Running]], tmp_path: Path) -> None:
    path = tmp_path / "run" / "ready.json"
    server = await launch(GRANQ_READY_FILE=str(path))
    await eventually(path.exists)
    ports = {name: server.ready[name] for name in ("port", "metrics_port")}
    assert json.loads(path.read_text()) == {**ports, "pid": server.process.pid}


async def test_resources_are_left_after_the_last_call(tmp_path: Path) -> None:
    class Resource:
        entered = left = False

        async def __aenter__(self) -> "Resource":
            self.entered = True
            return self

        async def __aexit__(self, *_error: object) -> None:
            self.left = True

    resource = Resource()
    server = GrpcServer("test", ServerSettings(port=0, artifact_url=tmp_path.as_uri()))
    server.manage(resource)
    await server.start()
    assert resource.entered
    assert not resource.left
    await server.stop(0)
    assert resource.left
