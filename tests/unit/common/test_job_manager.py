"""Jobs run, fail, are cancelled, die and resume, in real processes."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from granq.v1 import common_pb2, generator_pb2, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import AlreadyExistsError, NotFoundError, UnavailableError
from services.common.jobs import JobManager
from services.common.settings import ServerSettings
from tests.support import job_functions
from tests.support.waiting import eventually, is_gone

FUNCTIONS = (
    "count",
    "until_cancelled",
    "never_checks",
    "with_grandchild",
    "dies_once",
    "fails",
    "once_with_side_effect",
)
KINDS = {name: f"{job_functions.__name__}:{name}" for name in FUNCTIONS}
pytestmark = pytest.mark.timeout(60)
Events = list[jobs_pb2.WatchJobResponse]


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    return ServerSettings(artifact_url=(tmp_path / "store").as_uri(), cache_dir=tmp_path, log_format="json")


@pytest.fixture
async def new_manager(settings: ServerSettings) -> AsyncIterator[Callable[..., JobManager]]:
    managers: list[JobManager] = []

    def make(max_running: int = 2, kill_after: float = 3.0) -> JobManager:
        store = ArtifactStore(settings.artifact_url, settings.cache_dir)
        managers.append(JobManager(store, settings, KINDS, max_running, kill_after))
        return managers[-1]

    yield make
    for manager in managers:
        await manager.close(0)


@pytest.fixture
def manager(new_manager: Callable[..., JobManager]) -> JobManager:
    return new_manager()


def request(job_id: str, iterations: int = 0, architecture: str = "") -> generator_pb2.StartSynthesizeRequest:
    return generator_pb2.StartSynthesizeRequest(
        key=jobs_pb2.JobKey(job_id=job_id, pipeline_id="p1"),
        model=common_pb2.ModelSource(architecture=architecture),
        synthesis=common_pb2.SynthesisConfig(iterations=iterations),
    )


async def start(manager: JobManager, kind: str, asked: generator_pb2.StartSynthesizeRequest) -> jobs_pb2.Job:
    return await manager.start(kind, asked.key, asked)


async def events_of(manager: JobManager, job_id: str, after: int = 0, run_id: str = "") -> Events:
    return [event async for event in manager.watch(job_id, after, run_id)]


async def end_of(manager: JobManager, job_id: str) -> jobs_pb2.Job:
    return (await events_of(manager, job_id))[-1].job


async def first_progress(manager: JobManager, job_id: str) -> jobs_pb2.Progress:
    async for event in manager.watch(job_id):
        if event.job.HasField("progress"):
            return event.job.progress
    raise AssertionError("ended without progress")


async def test_succeeds_with_events_in_order(manager: JobManager) -> None:
    job = await start(manager, "count", request("a", iterations=5000))
    assert job.state == jobs_pb2.JOB_STATE_QUEUED
    assert (job.kind, job.key.job_id, job.key.pipeline_id) == ("count", "a", "p1")
    events = await events_of(manager, "a")
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert {event.run_id for event in events} == {job.run_id}
    states = [event.job.state for event in events]
    assert states == sorted(states)
    assert (states[0], states[1], states[-1]) == (1, 2, jobs_pb2.JOB_STATE_SUCCEEDED)
    end = events[-1].job
    assert end.result.synthesis.num_images == 5000
    assert end.end_time.ToNanoseconds() >= end.create_time.ToNanoseconds()
    steps = [event.job.progress for event in events if event.job.progress.phase == "counting"]
    assert steps[-1].step == steps[-1].total == 5000
    assert len(steps) < 100, "reports are throttled"
    assert [event.job.progress.phase for event in events][-2:] == ["leaving", "leaving"]
    assert await manager.get("a") == end


async def test_process_has_no_torch_and_its_log_names_the_job(
    manager: JobManager, capfd: pytest.CaptureFixture[str]
) -> None:
    await start(manager, "count", request("loud", iterations=1))
    assert (await end_of(manager, "loud")).result.synthesis.seconds == 0
    lines = capfd.readouterr().err.splitlines()
    counting = next(line for line in lines if '"counting"' in line)
    assert '"job_id": "loud"' in counting
    assert '"pipeline_id": "p1"' in counting
    assert "noise on standard output" in lines


async def test_start_again_attaches(manager: JobManager) -> None:
    first, second = await asyncio.gather(*(start(manager, "until_cancelled", request("a")) for _ in range(2)))
    assert first.run_id == second.run_id
    assert len(manager.list()) == 1
    other = request("a")
    other.key.pipeline_id = "p2"
    assert (await start(manager, "until_cancelled", other)).run_id == first.run_id


async def test_two_watch_and_one_comes_late(manager: JobManager) -> None:
    await start(manager, "count", request("a", iterations=100))
    first, second = await asyncio.gather(events_of(manager, "a"), events_of(manager, "a"))
    assert first == second == await events_of(manager, "a")
    assert await events_of(manager, "a", after=2) == first[2:]
    assert await events_of(manager, "a", after=2, run_id=first[0].run_id) == first[2:]
    assert await events_of(manager, "a", after=2, run_id="an-earlier-run") == first
    assert await events_of(manager, "a", after=len(first)) == []


async def test_same_id_with_another_request(manager: JobManager, new_manager: Callable[..., JobManager]) -> None:
    await start(manager, "count", request("a", iterations=1))
    await end_of(manager, "a")
    for server in (manager, new_manager()):
        for kind, asked in (("count", request("a", iterations=2)), ("until_cancelled", request("a", iterations=1))):
            with pytest.raises(AlreadyExistsError, match="'a'"):
                await start(server, kind, asked)


async def test_restarted_server_has_the_result(
    manager: JobManager, new_manager: Callable[..., JobManager], tmp_path: Path
) -> None:
    job = await start(manager, "once_with_side_effect", request("a"))
    end = await end_of(manager, "a")
    await manager.close(0)
    restarted = new_manager()
    assert await restarted.get("a") == end
    assert await start(restarted, "once_with_side_effect", request("a")) == end
    assert [event.job for event in await events_of(restarted, "a")] == [end]
    assert end.run_id == job.run_id
    assert (tmp_path / "ran").read_text() == "x"


async def test_killed_process_fails_then_resumes_from_checkpoint(
    manager: JobManager, capfd: pytest.CaptureFixture[str]
) -> None:
    first = await start(manager, "dies_once", request("a", iterations=10))
    end = await end_of(manager, "a")
    assert end.state == jobs_pb2.JOB_STATE_FAILED
    assert (end.failure.code, end.failure.reason) == (14, "JOB_PROCESS_DIED")
    assert "SIGKILL" in end.failure.message
    assert "last words" not in end.failure.message
    assert "last words" in capfd.readouterr().err
    second = await start(manager, "dies_once", request("a", iterations=10))
    assert second.run_id != first.run_id
    end = await end_of(manager, "a")
    assert (end.result.synthesis.num_images, end.result.synthesis.seconds) == (10, 2)
    assert (await events_of(manager, "a"))[0].sequence == 1


async def test_process_killed_from_outside(manager: JobManager) -> None:
    await start(manager, "until_cancelled", request("a"))
    os.kill((await first_progress(manager, "a")).step, signal.SIGKILL)
    assert (await end_of(manager, "a")).failure.reason == "JOB_PROCESS_DIED"


@pytest.mark.parametrize("times", [1, 2000])
async def test_process_terminated_from_outside_is_not_cancelled(manager: JobManager, times: int) -> None:
    await start(manager, "until_cancelled", request("a"))
    pid = (await first_progress(manager, "a")).step
    for _ in range(times):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    async with asyncio.timeout(20):  # less than an idle job is given up after
        failure = (await end_of(manager, "a")).failure
    assert (failure.code, failure.reason) == (14, "JOB_PROCESS_DIED")


@pytest.mark.parametrize(
    ("how", "code", "reason", "field"),
    [
        ("domain", 9, "NO_RUNTIME", "target.runtime"),
        ("loss", 15, "DATA_LOSS", ""),
        ("defect", 13, "INTERNAL", ""),
        ("memory", 8, "OUT_OF_MEMORY", ""),
        ("exit", 13, "JOB_PROCESS_EXITED", ""),
        ("system_exit", 13, "INTERNAL", ""),
        ("nothing", 13, "INTERNAL", ""),
    ],
)
async def test_failures(manager: JobManager, how: str, code: int, reason: str, field: str) -> None:
    await start(manager, "fails", request("a", architecture=how))
    end = await end_of(manager, "a")
    assert end.state == jobs_pb2.JOB_STATE_FAILED
    assert (end.failure.code, end.failure.reason, end.failure.field) == (code, reason, field)
    assert "secret" not in end.failure.message


async def test_cancel_is_noticed(manager: JobManager) -> None:
    await start(manager, "until_cancelled", request("a"))
    pid = (await first_progress(manager, "a")).step
    began = time.monotonic()
    await manager.cancel("a")
    assert (await end_of(manager, "a")).state == jobs_pb2.JOB_STATE_CANCELLED
    assert time.monotonic() - began < 2
    assert is_gone(pid)


@pytest.mark.parametrize("stopped", [False, True])
async def test_cancel_of_a_deaf_process(manager: JobManager, stopped: bool) -> None:
    await start(manager, "never_checks", request("a"))
    pid = (await first_progress(manager, "a")).step
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    await manager.cancel("a")
    await manager.cancel("a")
    assert (await end_of(manager, "a")).state == jobs_pb2.JOB_STATE_CANCELLED
    assert time.monotonic() - began < 5
    assert is_gone(pid)


@pytest.mark.parametrize("ended", [True, False])
async def test_cancelled_job_begins_anew(manager: JobManager, ended: bool) -> None:
    first = await start(manager, "until_cancelled", request("a"))
    pid = (await first_progress(manager, "a")).step
    await manager.cancel("a")
    if ended:
        assert (await end_of(manager, "a")).state == jobs_pb2.JOB_STATE_CANCELLED
    second = await start(manager, "until_cancelled", request("a"))
    assert is_gone(pid)
    assert second.run_id != first.run_id
    assert second.state == jobs_pb2.JOB_STATE_QUEUED


async def test_interrupted_jobs_have_ended_and_failed_with_the_error_also_those_that_waited(
    manager: JobManager,
) -> None:
    await start(manager, "until_cancelled", request("a"))
    pid = (await first_progress(manager, "a")).step
    for name in ("b", "c"):
        await start(manager, "until_cancelled", request(name))
    await manager.interrupt(UnavailableError("the lease has ended", reason="LEASE_ENDED"))
    assert is_gone(pid)
    for name in ("a", "b", "c"):
        job = await manager.get(name)
        assert (job.state, job.failure.reason) == (jobs_pb2.JOB_STATE_FAILED, "LEASE_ENDED")
    again = await start(manager, "until_cancelled", request("a"))
    assert again.state == jobs_pb2.JOB_STATE_QUEUED
    await manager.cancel("a")
    await end_of(manager, "a")


async def test_cancel_after_the_end_changes_nothing(manager: JobManager) -> None:
    await start(manager, "count", request("a"))
    end = await end_of(manager, "a")
    assert await manager.cancel("a") == end


async def test_process_that_was_stopped_goes_on(manager: JobManager) -> None:
    await start(manager, "until_cancelled", request("a"))
    process = psutil.Process((await first_progress(manager, "a")).step)
    process.suspend()
    await eventually(lambda: process.status() == psutil.STATUS_STOPPED)
    process.resume()
    await manager.cancel("a")
    assert (await end_of(manager, "a")).state == jobs_pb2.JOB_STATE_CANCELLED


async def test_what_a_dead_process_began_dies_too(manager: JobManager) -> None:
    await start(manager, "with_grandchild", request("a"))
    progress = await first_progress(manager, "a")
    os.kill(progress.total // 1000, signal.SIGKILL)
    assert (await end_of(manager, "a")).failure.reason == "JOB_PROCESS_DIED"
    await eventually(lambda: is_gone(progress.step))


async def test_queue_runs_in_order_and_can_be_left(new_manager: Callable[..., JobManager]) -> None:
    manager = new_manager(max_running=1)
    await start(manager, "until_cancelled", request("a"))
    await first_progress(manager, "a")
    for job_id in ("b", "c"):
        await start(manager, "count", request(job_id))
    assert [job.key.job_id for job in manager.list()] == ["c", "b", "a"]
    await manager.cancel("b")
    assert (await end_of(manager, "b")).state == jobs_pb2.JOB_STATE_CANCELLED
    assert (await manager.get("c")).state == jobs_pb2.JOB_STATE_QUEUED
    await manager.cancel("a")
    assert (await end_of(manager, "c")).state == jobs_pb2.JOB_STATE_SUCCEEDED


async def test_the_queue_goes_by_priority(new_manager: Callable[..., JobManager]) -> None:
    manager = new_manager(max_running=1)
    await start(manager, "until_cancelled", request("first"))
    await first_progress(manager, "first")
    for job_id, priority in (("low", -5), ("normal", 0), ("high", 7)):
        asked = request(job_id)
        asked.key.priority = priority
        await start(manager, "count", asked)
    await manager.cancel("first")
    ends = {job_id: (await end_of(manager, job_id)).end_time.ToNanoseconds() for job_id in ("low", "normal", "high")}
    assert sorted(ends, key=ends.__getitem__) == ["high", "normal", "low"]


@pytest.mark.parametrize(("kind", "grace"), [("until_cancelled", 10.0), ("never_checks", 0.3)])
async def test_close_ends_processes_but_fails_no_job(
    new_manager: Callable[..., JobManager], settings: ServerSettings, kind: str, grace: float
) -> None:
    manager = new_manager(max_running=1)
    await start(manager, kind, request("a"))
    await start(manager, "count", request("queued"))
    pid = (await first_progress(manager, "a")).step
    watches = [asyncio.create_task(events_of(manager, job_id)) for job_id in ("a", "queued")]
    await manager.close(grace)
    assert is_gone(pid)
    for watch in watches:
        with pytest.raises(UnavailableError, match="about to end"):
            await watch
    with pytest.raises(UnavailableError):
        await start(manager, "count", request("late"))
    assert ArtifactStore(settings.artifact_url).list_refs("jobs/a/") == ["jobs/a/request"]
    restarted = new_manager()
    with pytest.raises(NotFoundError):
        await restarted.get("a")
    assert (await start(restarted, kind, request("a"))).state == jobs_pb2.JOB_STATE_QUEUED


async def test_unknown_job(manager: JobManager) -> None:
    for call in (manager.get, manager.cancel, lambda job_id: events_of(manager, job_id)):
        with pytest.raises(NotFoundError, match="'nothing'"):
            await call("nothing")
