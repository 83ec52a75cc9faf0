"""A device's life in the pool, with a coordinator that is told what to answer and a clock that is set by hand."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from granq.v1 import devices_pb2
from services.common.errors import FailedPreconditionError, GranqError, NotFoundError, UnavailableError
from services.evaluator import enrolment
from services.evaluator.enrolment import Enrolment
from services.evaluator.identity import Identity

AWAY = UnavailableError("nobody there")


class Pool:
    """The coordinator, and all that a device does to its own jobs."""

    def __init__(self, lease: float) -> None:
        self.lease = lease
        self.heartbeat = 0.01
        self.refuse: GranqError | None = None
        self.register_error: GranqError | None = None
        self.registrations: list[devices_pb2.RegisterDeviceRequest] = []
        self.heartbeats = 0
        self.goodbyes = 0
        self.interruptions: list[GranqError] = []
        self.reports: list[bool] = []

    async def register(self, request: devices_pb2.RegisterDeviceRequest) -> devices_pb2.RegisterDeviceResponse:
        self.registrations.append(request)
        if self.register_error is not None:
            raise self.register_error
        return devices_pb2.RegisterDeviceResponse(heartbeat_seconds=self.heartbeat, lease_seconds=self.lease)

    async def renew(self, device_id: str, instance_id: str) -> None:
        self.heartbeats += 1
        if self.refuse is not None:
            raise self.refuse

    async def leave(self, device_id: str, instance_id: str) -> None:
        self.goodbyes += 1

    async def interrupt(self, error: GranqError) -> None:
        self.interruptions.append(error)

    async def report(self, registered: bool) -> None:
        self.reports.append(registered)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def enrolled(pool: Pool, folder: Path, serve: Callable[[], object] | None = None) -> AsyncIterator[Enrolment]:
    identity = Identity(folder, "nano")
    made = Enrolment(
        coordinator=pool,
        identity=identity,
        info=devices_pb2.DeviceInfo(device_id="nano", platform="linux-aarch64"),
        interrupt=pool.interrupt,
        serve=serve,  # type: ignore[arg-type]
        report=pool.report,
    )
    made.start()
    try:
        yield made
    finally:
        await made.stop()
        identity.close()


@pytest.fixture(autouse=True)
def _prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "_FIRST_DELAY", 0.01)
    monkeypatch.setattr(enrolment, "_LAST_DELAY", 0.02)


async def test_heartbeats_keep_the_lease(tmp_path: Path) -> None:
    pool = Pool(lease=60)
    async with enrolled(pool, tmp_path) as device:
        await until(lambda: pool.heartbeats >= 3)
        assert (len(pool.registrations), pool.interruptions, pool.reports) == (1, [], [True])
        await device.stop()
        assert pool.reports[-1] is False
        await device.say_goodbye()
        assert pool.goodbyes == 1


async def test_a_coordinator_that_is_away_is_registered_with_when_it_is_back(tmp_path: Path) -> None:
    pool = Pool(lease=60)
    pool.register_error = AWAY
    async with enrolled(pool, tmp_path) as device:
        await until(lambda: len(pool.registrations) >= 3)
        pool.register_error = None
        await until(lambda: pool.heartbeats >= 1)
        assert True in pool.reports
        assert pool.interruptions == []
        await device.stop()


async def test_jobs_end_with_the_lease_and_the_device_goes_on_when_the_coordinator_is_back(tmp_path: Path) -> None:
    pool = Pool(lease=0.2)
    async with enrolled(pool, tmp_path):
        await until(lambda: pool.heartbeats >= 1)
        pool.refuse = AWAY
        await until(lambda: bool(pool.interruptions))
        assert pool.interruptions[0].reason == "LEASE_ENDED"
        assert isinstance(pool.interruptions[0], UnavailableError)
        pool.refuse = None
        beats, ended = pool.heartbeats, len(pool.interruptions)
        await until(lambda: pool.heartbeats > beats + 2)
        assert len(pool.registrations) == 1, "the lease is taken up again"
        assert len(pool.interruptions) <= ended + 1


async def test_a_device_that_slept_ends_its_jobs_before_it_asks_for_more_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the coordinator, which has started them elsewhere by then, would renew the lease of one that has them."""
    clock = [1000.0]
    monkeypatch.setattr(enrolment, "now", lambda: clock[0])
    pool = Pool(lease=60)
    seen: list[int] = []
    renew = pool.renew

    async def renewing(device_id: str, instance_id: str) -> None:
        seen.append(len(pool.interruptions))
        await renew(device_id, instance_id)

    pool.renew = renewing  # type: ignore[method-assign]
    async with enrolled(pool, tmp_path):
        await until(lambda: len(seen) >= 2)
        assert set(seen) == {0}
        clock[0] += 3600
        count = len(seen)
        await until(lambda: len(seen) > count + 1)
        assert all(interruptions >= 1 for interruptions in seen[count:]), seen


async def test_a_heartbeat_counts_from_its_sending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(enrolment, "now", lambda: clock[0])
    pool = Pool(lease=60)

    async def slow(device_id: str, instance_id: str) -> None:
        pool.heartbeats += 1
        clock[0] += 61  # the answer comes when the lease that it brings has ended

    pool.renew = slow  # type: ignore[method-assign]
    async with enrolled(pool, tmp_path):
        await until(lambda: bool(pool.interruptions))


async def test_a_device_that_the_coordinator_does_not_know_ends_its_jobs_and_registers_anew(tmp_path: Path) -> None:
    pool = Pool(lease=60)
    async with enrolled(pool, tmp_path):
        await until(lambda: pool.heartbeats >= 1)
        pool.refuse = NotFoundError("who are you?", reason="DEVICE_UNKNOWN")
        await until(lambda: bool(pool.interruptions))
        pool.refuse = None
        await until(lambda: len(pool.registrations) >= 2)


async def test_the_stream_is_opened_again_whenever_it_ends(tmp_path: Path) -> None:
    pool, opened = Pool(lease=60), []

    async def serve() -> None:
        opened.append(1)
        if len(opened) % 2:
            raise AWAY

    async with enrolled(pool, tmp_path, serve):
        await until(lambda: len(opened) >= 4)
        assert len(pool.registrations) == 1


async def test_a_restarted_process_names_the_one_before_it_only_once_that_was_registered(tmp_path: Path) -> None:
    pool = Pool(lease=60)
    pool.register_error = FailedPreconditionError("taken")
    async with enrolled(pool, tmp_path):
        await until(lambda: len(pool.registrations) >= 1)
    pool.register_error = None
    async with enrolled(pool, tmp_path) as device:
        await until(lambda: pool.heartbeats >= 1)
        await device.stop()
    registered = pool.registrations[-1]
    async with enrolled(pool, tmp_path):
        await until(lambda: pool.registrations[-1] is not registered)
    assert [r.replaces_instance_id for r in (registered, pool.registrations[-1])] == ["", registered.instance_id]
    assert pool.registrations[-1].instance_id != registered.instance_id


def test_one_process_of_a_machine_has_a_name(tmp_path: Path) -> None:
    first = Identity(tmp_path, "nano")
    with pytest.raises(FailedPreconditionError, match="another device_id"):
        Identity(tmp_path, "nano")
    Identity(tmp_path, "other").close()
    first.close()
    Identity(tmp_path, "nano").close()
