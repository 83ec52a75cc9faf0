"""At most one process at a time runs a job, whichever workers are asked for it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from granq.v1 import generator_pb2, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import UnavailableError
from services.common.jobs import JobManager, lease
from services.common.jobs.lease import Lease, LeaseLostError, release
from services.common.jobs.process import child_environment
from services.common.settings import ServerSettings
from tests.support import job_functions
from tests.support.waiting import eventually, is_gone

KINDS = {name: f"{job_functions.__name__}:{name}" for name in ("until_told",)}
SECONDS = 1.0


class GaveUpError(Exception):
    """Raised by a test that waits no longer."""


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "file":
        return ArtifactStore((tmp_path / "store").as_uri())
    return ArtifactStore(f"memory://{uuid4().hex}/prefix", tmp_path / "cache")


def not_at_all() -> None:
    raise GaveUpError


def test_one_of_many_gets_it(store: ArtifactStore) -> None:
    together = threading.Barrier(8)

    def contend(number: int) -> bool:
        wanted = Lease(store, "job", f"owner {number}", SECONDS)
        together.wait()
        try:
            return not wanted.take(not_at_all)
        except GaveUpError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(contend, range(8))) == 1
    assert len(store.list_refs("leases/job/")) == 1


def test_the_next_gets_it_when_it_is_released(store: ArtifactStore) -> None:
    Lease(store, "job", "first", SECONDS).take(not_at_all)
    Lease(store, "another", "first", SECONDS).take(not_at_all)
    release(store, "job", "somebody")
    second = Lease(store, "job", "second", 60)
    assert second.take(lambda: release(store, "job", "first"))
    second.renew()
    assert store.list_refs("leases/another/") == ["leases/another/1"]


def test_one_that_gives_no_sign_loses_it_and_notices(store: ArtifactStore) -> None:
    first = Lease(store, "job", "first", SECONDS)
    first.take(not_at_all)
    second = Lease(store, "job", "second", SECONDS)
    waits: list[int] = []
    assert second.take(lambda: waits.append(1))
    assert waits
    with pytest.raises(LeaseLostError):
        first.renew()
    with pytest.raises(LeaseLostError):
        first.check()
    second.renew()
    second.check()


def test_one_that_renews_keeps_it(store: ArtifactStore) -> None:
    first, lost = Lease(store, "job", "first", SECONDS), threading.Event()
    first.take(not_at_all)
    first.keep(lost.set)
    looks = 0

    def wait() -> None:
        nonlocal looks
        looks += 1
        if looks == 12:  # three times as long as one without a sign would have it
            raise GaveUpError

    with pytest.raises(GaveUpError):
        Lease(store, "job", "second", SECONDS).take(wait)
    assert not lost.is_set()
    Lease(store, "job", "third", SECONDS).revoke()
    assert lost.wait(5)


def test_one_whose_process_is_gone_has_no_claim(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    code = f"""
from services.common.artifacts import ArtifactStore
from services.common.jobs.lease import Lease
Lease(ArtifactStore({url!r}), "job", "first", 3600).take(None)
"""
    subprocess.run([sys.executable, "-P", "-c", code], env=child_environment(), check=True)
    assert not Lease(ArtifactStore(url), "job", "second", 3600).take(not_at_all)


def test_work_waits_for_a_store_that_is_away(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Lease(store, "job", "first", SECONDS)
    held.take(not_at_all)
    set_ref, failures = store.set_ref, 0

    def fails_twice(name: str, data: bytes) -> None:
        nonlocal failures
        failures += 1
        if failures <= 2:
            raise UnavailableError("the artifact store failed")
        set_ref(name, data)

    monkeypatch.setattr(store, "set_ref", fails_twice)
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.01)
    held._written -= SECONDS
    held.check()
    assert failures == 3


def request(job_id: str) -> generator_pb2.StartSynthesizeRequest:
    return generator_pb2.StartSynthesizeRequest(key=jobs_pb2.JobKey(job_id=job_id))


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[tuple[JobManager, JobManager]]:
    """Two workers on one store."""
    settings = ServerSettings(
        artifact_url=(tmp_path / "store").as_uri(), cache_dir=tmp_path, log_format="json", lease_seconds=2
    )
    made = [JobManager(ArtifactStore(settings.artifact_url), settings, KINDS, 1) for _ in range(2)]
    yield made[0], made[1]
    for manager in made:
        await manager.close(0)


async def start(manager: JobManager, kind: str, asked: generator_pb2.StartSynthesizeRequest) -> jobs_pb2.Job:
    return await manager.start(kind, asked.key, asked)


async def until(manager: JobManager, condition: Callable[[jobs_pb2.Job], bool]) -> jobs_pb2.Job:
    async for event in manager.watch("a"):
        if condition(event.job):
            return event.job
    raise AssertionError(f"ended before: {await manager.get('a')}")


def works(job: jobs_pb2.Job) -> bool:
    return job.progress.phase == "working"


def waits(job: jobs_pb2.Job) -> bool:
    return job.progress.phase.startswith("waiting for the worker")


def ended(job: jobs_pb2.Job) -> bool:
    return job.state >= jobs_pb2.JOB_STATE_SUCCEEDED


async def test_a_second_worker_waits_and_has_the_result(workers: tuple[JobManager, JobManager], tmp_path: Path) -> None:
    first, second = workers
    await start(first, "until_told", request("a"))
    await until(first, works)
    await start(second, "until_told", request("a"))
    await until(second, waits)
    (tmp_path / "told").touch()
    results = [(await until(worker, ended)).result for worker in workers]
    assert results[0] == results[1]
    assert (tmp_path / "ran").read_text() == "x"


async def test_a_second_worker_goes_on_when_the_first_is_killed(
    workers: tuple[JobManager, JobManager], tmp_path: Path
) -> None:
    first, second = workers
    await start(first, "until_told", request("a"))
    pid = (await until(first, works)).progress.step
    await start(second, "until_told", request("a"))
    await until(second, waits)
    os.kill(pid, signal.SIGKILL)
    assert (await until(second, works)).progress.step != pid
    assert (await until(first, ended)).failure.reason == "JOB_PROCESS_DIED"
    (tmp_path / "told").touch()
    assert (await until(second, ended)).state == jobs_pb2.JOB_STATE_SUCCEEDED


async def test_a_frozen_process_that_was_replaced_ends_when_it_wakes(
    workers: tuple[JobManager, JobManager], tmp_path: Path
) -> None:
    first, second = workers
    await start(first, "until_told", request("a"))
    frozen = psutil.Process((await until(first, works)).progress.step)
    frozen.suspend()
    await start(second, "until_told", request("a"))
    await until(second, works)
    assert frozen.status() == psutil.STATUS_STOPPED
    frozen.resume()
    failure = (await until(first, ended)).failure
    assert (failure.code, failure.reason) == (14, "LEASE_LOST")
    await eventually(lambda: is_gone(frozen.pid))
    assert (tmp_path / "ran").read_text() == "xx"
    (tmp_path / "told").touch()
    assert (await until(second, ended)).state == jobs_pb2.JOB_STATE_SUCCEEDED


async def test_cancelling_where_it_waits_ends_it_where_it_runs(workers: tuple[JobManager, JobManager]) -> None:
    first, second = workers
    await start(first, "until_told", request("a"))
    pid = (await until(first, works)).progress.step
    await start(second, "until_told", request("a"))
    await until(second, waits)
    await second.cancel("a")
    assert (await until(second, ended)).state == jobs_pb2.JOB_STATE_CANCELLED
    await eventually(lambda: is_gone(pid))


async def test_a_worker_that_stops_while_it_waits_does_no_harm(
    workers: tuple[JobManager, JobManager], tmp_path: Path
) -> None:
    first, second = workers
    await start(first, "until_told", request("a"))
    await until(first, works)
    await start(second, "until_told", request("a"))
    await until(second, waits)
    await second.close(10)
    (tmp_path / "told").touch()
    assert (await until(first, ended)).state == jobs_pb2.JOB_STATE_SUCCEEDED
    assert (tmp_path / "ran").read_text() == "x"


async def test_no_lease_is_left(workers: tuple[JobManager, JobManager], tmp_path: Path) -> None:
    (tmp_path / "told").touch()
    await start(workers[0], "until_told", request("a"))
    await until(workers[0], ended)
    store = ArtifactStore((tmp_path / "store").as_uri())
    await eventually(lambda: not store.list_refs("leases/"))
