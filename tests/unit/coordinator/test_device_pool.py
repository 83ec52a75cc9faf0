"""Who gets a device, and what those who do not are told."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from granq.v1 import common_pb2, devices_pb2, evaluator_pb2, jobs_pb2, reports_pb2
from services.common.errors import FailedPreconditionError, UnavailableError
from services.coordinator.calls import DatabaseCalls
from services.coordinator.devices.metrics import DeviceCollector
from services.coordinator.devices.needs import need_of
from services.coordinator.devices.pool import DevicePool, Placement
from services.coordinator.devices.reach import ConfiguredEvaluator
from services.coordinator.devices.table import DeviceTable, Terms
from services.coordinator.requests import JobCall
from services.coordinator.threads import Threads
from tests.support.pipelines import Database

TRT, RTX = common_pb2.RUNTIME_TENSORRT, common_pb2.RUNTIME_TENSORRT_RTX
INSTANCE = "a" * 32


class Configured:
    """The configured evaluator: a machine with the given runtimes, or one that does not answer."""

    def __init__(self) -> None:
        self.versions: dict[int, str] | None = {}

    async def capabilities(self) -> evaluator_pb2.GetCapabilitiesResponse:
        if self.versions is None:
            raise UnavailableError("nobody there")
        found = evaluator_pb2.GetCapabilitiesResponse(platform="linux-x86_64")
        for runtime, version in self.versions.items():
            found.runtimes.add(runtime=runtime, version=version)
        return found

    async def start(self, call: JobCall) -> jobs_pb2.Job:
        raise AssertionError

    async def get(self, worker: str, job_id: str) -> jobs_pb2.Job:
        raise AssertionError

    def watch(
        self, worker: str, job_id: str, run_id: str, sequence: int
    ) -> AsyncGenerator[jobs_pb2.WatchJobResponse, None]:
        raise AssertionError

    async def cancel(self, worker: str, job_id: str, timeout_seconds: float) -> jobs_pb2.Job:
        raise AssertionError


class Case:
    """A pool on a database, whose devices have addresses that nobody dials."""

    def __init__(self, database: Database, threads: Threads) -> None:
        self.table = DeviceTable(database.engine, Terms(10, 60))
        self.database = database
        self.evaluator = Configured()
        self.told: dict[str, list[str]] = {}
        self.pool = DevicePool(
            table=self.table,
            calls=DatabaseCalls(threads),
            evaluator=ConfiguredEvaluator(self.evaluator),
            dial=lambda device_id, address: pytest.fail("nothing is called here"),
            patience_seconds=0.3,
            poll_seconds=0.05,
        )

    async def device(self, name: str, targets: tuple[str, ...] = (), version: str = "10.3.0") -> None:
        info = devices_pb2.DeviceInfo(
            device_id=name,
            address="192.0.2.1:50053",
            platform="linux-aarch64",
            gpu="Orin",
            compute_capability="8.7",
            targets=targets,
        )
        info.runtimes.add(runtime=TRT, version=version)
        self.table.register(info, INSTANCE, "")
        await self.pool.changed()

    def acquire(self, job: str, priority: int = 0, **target: Any) -> "asyncio.Task[Placement]":
        async def wait(text: str) -> None:
            self.told.setdefault(job, []).append(text)

        return asyncio.create_task(self.pool.acquire(build(job, priority, **target), "pipeline", wait))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)


def build(job: str, priority: int = 0, **target: Any) -> JobCall:
    values: dict[str, Any] = {"name": "orin", "runtime": TRT, "platform": "linux-aarch64"} | target
    request = evaluator_pb2.StartBuildEngineRequest(
        key=jobs_pb2.JobKey(job_id=job, priority=priority),
        target=common_pb2.EngineTarget(**values),
    )
    return JobCall("evaluator", request)


@pytest.fixture
async def case(sqlite: Database, threads: Threads) -> AsyncIterator[Case]:
    made = Case(sqlite, threads)
    async with started(made.pool):
        yield made


@asynccontextmanager
async def started(pool: DevicePool) -> AsyncIterator[None]:
    await pool.start()
    try:
        yield
    finally:
        await pool.close()


async def test_without_devices_the_configured_evaluator_has_all_jobs(case: Case) -> None:
    placement = await case.acquire("job")
    assert (placement.device_id, placement.instead) == ("", "")
    assert placement.workers is case.evaluator


async def test_who_waits_longest_is_served_first(case: Case) -> None:
    await case.device("nano")
    assert (await case.acquire("first")).device_id == "nano"
    waiting = []
    for job in ("second", "third"):
        waiting.append(case.acquire(job))
        await case.until(lambda job=job: job in case.told)  # type: ignore[misc]
    assert case.told["second"] == ["waits for a device: nano (has a job of pipeline pipeline)"]
    assert case.told["third"][0].endswith("; place 2 in the queue")
    assert case.pool.counts()[1] == {"orin": 2}
    for previous, task in zip(("first", "second"), waiting, strict=True):
        assert not task.done()
        await case.pool.release(previous)
        assert (await task).device_id == "nano"
    assert case.pool.counts()[1] == {}


async def test_a_higher_priority_goes_before_those_who_wait_longer(case: Case) -> None:
    await case.device("nano")
    assert (await case.acquire("running")).device_id == "nano"
    ordinary = case.acquire("ordinary")
    await case.until(lambda: "ordinary" in case.told)
    urgent = case.acquire("urgent", priority=5)
    await case.until(lambda: "urgent" in case.told)
    await case.until(lambda: case.told["ordinary"][-1].endswith("; place 2 in the queue"))
    await case.pool.release("running")
    assert (await urgent).device_id == "nano"
    assert not ordinary.done()
    await case.pool.release("urgent")
    assert (await ordinary).device_id == "nano"


async def test_a_new_device_is_taken_by_the_first_that_it_fits(case: Case) -> None:
    await case.device("nano")
    await case.acquire("first")
    other = case.acquire("second", name="special")
    mine = case.acquire("third")
    await case.until(lambda: set(case.told) == {"second", "third"})
    await case.device("another", targets=("orin",))
    assert (await mine).device_id == "another"
    await case.pool.release("first")
    assert (await other).device_id == "nano"


async def test_the_configured_evaluator_takes_what_it_can_when_no_device_is_free(case: Case) -> None:
    case.evaluator.versions = {RTX: "1.7"}
    await case.device("nano", targets=("orin", "ada"))
    ada: dict[str, Any] = {"name": "ada", "runtime": RTX, "platform": ""}
    assert (await case.acquire("first")).device_id == "nano"
    placement = await case.acquire("second", **ada)
    assert placement.device_id == ""
    assert "device nano: TensorRT-RTX is not installed" in placement.instead


async def test_a_job_that_runs_at_the_configured_evaluator_stays_there(case: Case) -> None:
    """A device that came since the coordinator was stopped would run it a second time."""
    pipeline = case.database.create()
    case.database.repository.open_job(pipeline, "job", "evaluator")
    await case.device("nano")

    async def wait(text: str) -> None:
        raise AssertionError(text)

    assert (await case.pool.acquire(build("job"), pipeline, wait)).device_id == ""
    assert (await case.pool.acquire(build("other"), pipeline, wait)).device_id == "nano"


async def test_a_job_keeps_its_device_over_a_restart(case: Case) -> None:
    for name in ("nano", "other"):
        await case.device(name)
    assert case.table.claim("other", INSTANCE, "pipeline", "job")
    assert (await case.acquire("job")).device_id == "other"


async def test_patience_with_devices_that_are_away_ends(case: Case) -> None:
    await case.device("nano")
    await case.device("old", version="8.6")
    case.table.leave("nano", INSTANCE)
    case.evaluator.versions = None
    with pytest.raises(
        FailedPreconditionError, match=r"orin.*nano \(deregistered\); device old: it has TensorRT 8\.6"
    ) as e:
        await case.acquire("job", runtime_version="10")
    assert e.value.reason == "DEVICE_AWAY"


async def test_what_no_device_can_do_is_not_waited_for(case: Case) -> None:
    await case.device("nano")
    placement = await case.acquire("job", runtime_version="8")
    assert (placement.device_id, placement.instead) == ("", "device nano: it has TensorRT 10.3.0, not 8")


@pytest.mark.parametrize(
    ("target", "targets", "unmet"),
    [
        ({}, (), []),
        ({}, ("orin",), []),
        ({}, ("thor",), ["it is meant for thor"]),
        ({"runtime": 0, "platform": ""}, (), ["it lists no such target"]),
        ({"runtime": 0, "platform": ""}, ("orin",), []),
        ({"compute_capabilities": ["8.9"]}, (), ["its Orin has compute capability 8.7, not 8.9"]),
        ({"platform": "linux-x86_64"}, (), ["it is linux-aarch64, not linux-x86_64"]),
    ],
)
def test_which_devices_a_build_may_have(target: dict[str, Any], targets: tuple[str, ...], unmet: list[str]) -> None:
    info = devices_pb2.DeviceInfo(platform="linux-aarch64", gpu="Orin", compute_capability="8.7", targets=targets)
    info.runtimes.add(runtime=TRT, version="10.3.0")
    need = need_of(build("job", **target))
    assert need is not None
    assert need.unmet(info) == unmet


def test_an_engine_is_measured_where_its_manifest_fits() -> None:
    manifest = reports_pb2.EngineManifest(
        runtime=TRT, runtime_version="10.3.0", platform="linux-aarch64", compute_capabilities=["8.7"]
    )
    need = need_of(JobCall("evaluator", evaluator_pb2.StartEvaluateRequest(engine=manifest), engine="orin"))
    assert need is not None
    info = devices_pb2.DeviceInfo(platform="linux-aarch64", gpu="Orin", compute_capability="8.7")
    info.runtimes.add(runtime=TRT, version="10.3.0")
    assert need.unmet(info) == []
    info.runtimes[0].version = "10.7.0"
    assert "10.3.0 exactly" in need.unmet(info)[0]
    assert need_of(JobCall("evaluator", evaluator_pb2.StartEvaluateRequest())) is None, "graphs have no device"


def test_targets_that_are_not_shipped_share_a_series() -> None:
    registry = CollectorRegistry()
    states: dict[int, int] = {devices_pb2.DEVICE_STATE_READY: 2, devices_pb2.DEVICE_STATE_AWAY: 1}
    registry.register(DeviceCollector(lambda: (states, {"jetson-orin-nano": 3, "made-up": 1, "": 1})))

    def figure(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert [figure("granq_devices", state=state) for state in ("ready", "busy", "away")] == [2, 0, 1]
    assert figure("granq_device_queue_depth", target_kind="jetson-orin-nano") == 3
    assert figure("granq_device_queue_depth", target_kind="other") == 2
    assert figure("granq_device_queue_depth", target_kind="made-up") is None
