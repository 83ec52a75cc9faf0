"""What keeps a job from running on two devices, on SQLite and PostgreSQL."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from granq.v1 import devices_pb2
from services.common.errors import FailedPreconditionError, NotFoundError
from services.coordinator.devices.table import DeviceRecord, DeviceTable, Place, Terms
from services.coordinator.tables import DeviceRow, PipelineRow
from services.coordinator.transitions import State
from tests.support.pipelines import ME, Database

FIRST, SECOND = "a" * 32, "b" * 32


class Case:
    """A table, and devices and jobs of this test's own: the PostgreSQL database is shared."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.table = DeviceTable(database.engine, Terms(10, 60))
        self._mark = uuid.uuid4().hex[:12]

    def name(self, name: str) -> str:
        return f"{name}-{self._mark}"

    def register(self, name: str, instance: str = FIRST, replaces: str = "") -> None:
        info = devices_pb2.DeviceInfo(device_id=self.name(name), platform="linux-aarch64")
        self.table.register(info, instance, replaces)

    def claim(self, name: str, job: str, instance: str = FIRST) -> bool:
        return self.table.claim(self.name(name), instance, "pipeline", self.name(job))

    def end_lease(self, name: str) -> None:
        with Session(self.database.engine) as session, session.begin():
            session.execute(update(DeviceRow).where(DeviceRow.device_id == self.name(name)).values(lease_end=1))

    def of(self, job: str) -> str:
        found = self.table.find(self.name(job))
        return found.device_id if found is not None else ""


@pytest.fixture
def case(database: Database) -> Case:
    return Case(database)


def test_a_device_has_one_job_and_a_job_one_device(case: Case) -> None:
    for name in ("one", "two"):
        case.register(name)
    assert case.claim("one", "job")
    assert case.claim("one", "job"), "a repeat changes nothing"
    assert not case.claim("one", "other")
    assert not case.claim("two", "job"), "it has a device whose lease goes on"
    assert case.of("job") == case.name("one")
    case.table.release(case.name("job"))
    assert case.claim("one", "other")
    assert case.claim("two", "job")


def test_a_job_moves_only_when_the_lease_of_its_device_has_ended(case: Case) -> None:
    for name in ("one", "two"):
        case.register(name)
    assert case.claim("one", "job")
    case.end_lease("one")
    assert not case.claim("one", "other"), "without a lease it gets nothing"
    assert case.claim("two", "job")
    assert case.of("job") == case.name("two")
    case.register("one")
    assert case.claim("one", "other"), "it is free once it is back"


def test_a_claim_is_for_the_instance_that_was_seen(case: Case) -> None:
    case.register("one")
    case.register("one", SECOND, replaces=FIRST)
    assert not case.claim("one", "job", FIRST)
    assert case.claim("one", "job", SECOND)


@pytest.mark.parametrize("devices", [1, 4])
def test_of_many_at_once_each_gets_at_most_one(case: Case, devices: int) -> None:
    names = [f"device{number}" for number in range(devices)]
    for name in names:
        case.register(name)
    wishes = [(name, f"job{job}") for job in range(4) for name in names]
    with ThreadPoolExecutor(8) as threads:
        granted = [wish for wish, got in zip(wishes, threads.map(lambda w: case.claim(*w), wishes), strict=True) if got]
    assert len({name for name, _ in granted}) == len(granted), granted
    assert len({job for _, job in granted}) == len(granted), granted
    assert len(granted) == devices, "and nothing stays free in vain"


def test_another_instance_waits_for_the_lease_or_proves_that_the_first_has_ended(case: Case) -> None:
    case.register("one")
    case.register("one")
    with pytest.raises(FailedPreconditionError, match=r"another evaluator .* admitted in \d\d s") as caught:
        case.register("one", SECOND)
    assert (caught.value.reason, caught.value.field) == ("DEVICE_ID_TAKEN", "info.device_id")
    case.end_lease("one")
    case.register("one", SECOND)
    with pytest.raises(NotFoundError):
        case.table.renew(case.name("one"), FIRST)
    case.table.renew(case.name("one"), SECOND)
    case.register("one", FIRST, replaces=SECOND)


def test_a_goodbye_ends_the_lease_at_once_and_a_heartbeat_does_not_bring_it_back(case: Case) -> None:
    case.register("one")
    case.register("two")
    assert case.claim("one", "job")
    case.table.leave(case.name("one"), SECOND)
    assert not case.claim("two", "job"), "a stranger's goodbye does nothing"
    case.table.leave(case.name("one"), FIRST)
    assert case.claim("two", "job")
    with pytest.raises(NotFoundError, match="not registered"):
        case.table.renew(case.name("one"), FIRST)


def test_only_a_device_that_is_gone_is_forgotten(case: Case) -> None:
    with pytest.raises(NotFoundError):
        case.table.remove(case.name("one"))
    case.register("one")
    with pytest.raises(FailedPreconditionError, match="stop its evaluator"):
        case.table.remove(case.name("one"))
    case.table.leave(case.name("one"), FIRST)
    case.table.remove(case.name("one"))
    assert case.name("one") not in [device.device_id for device in case.table.all()]


def test_where_a_job_is(case: Case) -> None:
    pipeline = case.database.create()
    job = case.name("job")
    assert case.table.place(pipeline, job) is Place.NOWHERE
    case.database.repository.open_job(pipeline, job, "evaluator")
    assert case.table.place(pipeline, job) is Place.EVALUATOR
    case.register("one")
    assert case.claim("one", "job")
    found = case.table.place(pipeline, job)
    assert isinstance(found, DeviceRecord)
    assert found.device_id == case.name("one")


def test_a_device_is_freed_of_jobs_whose_pipeline_has_ended_but_not_when_that_was_retried(case: Case) -> None:
    pipeline = case.database.create()
    case.register("one")
    assert case.table.claim(case.name("one"), FIRST, pipeline, case.name("job"))

    def unwanted() -> list[str]:
        return [device.job_id for device in case.table.unwanted()]

    def set_state(state: State) -> None:
        with Session(case.database.engine) as session, session.begin():
            session.get_one(PipelineRow, pipeline).state = state

    assert case.name("job") not in unwanted()
    set_state(State.PIPELINE_STATE_FAILED)
    assert case.name("job") in unwanted()
    case.database.transitions.retry(pipeline, ME)
    assert not case.table.release_unwanted(case.name("job"), pipeline)
    assert case.of("job") == case.name("one")
    set_state(State.PIPELINE_STATE_CANCELLED)
    case.database.repository.delete(pipeline)
    assert case.name("job") in unwanted(), "also when it was deleted"
    assert case.table.release_unwanted(case.name("job"), pipeline)
    assert case.of("job") == ""
