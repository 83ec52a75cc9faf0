"""The stored pool: devices, their leases, and which job has which device.

All that keeps a job from running on two devices is here, in transactions: a job's claim moves to another device only
once the lease of the one that had it has ended, by when that one has ended the job itself.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from sqlalchemy import Engine, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from granq.engines.machine import Gpu, Machine
from granq.v1 import devices_pb2
from services.common.errors import FailedPreconditionError, NotFoundError
from services.coordinator.database import read_session
from services.coordinator.tables import DeviceRow, JobRow, PipelineRow
from services.coordinator.transitions import ENDED, now_us

_MICROSECONDS = 1_000_000


@dataclass(frozen=True)
class Terms:
    """What a device agrees to by registering, in seconds.

    Attributes:
        heartbeat_seconds: Time from one heartbeat to the next.
        lease_seconds: Time after which a silent device has ended its jobs.
    """

    heartbeat_seconds: float
    lease_seconds: float

    @property
    def silent_us(self) -> int:
        """Silence in microseconds after which a device counts as away: three heartbeats."""
        return round(3 * self.heartbeat_seconds * _MICROSECONDS)

    @property
    def held_us(self) -> int:
        """Silence in microseconds after which its job may go elsewhere: the device needs a moment to end it."""
        return round(1.25 * self.lease_seconds * _MICROSECONDS)


@dataclass(frozen=True)
class DeviceRecord:
    """A device as it is stored; times in microseconds since the epoch."""

    info: devices_pb2.DeviceInfo
    instance_id: str
    last_seen: int
    lease_end: int
    create_time: int
    job_id: str
    pipeline_id: str
    claim_time: int

    @property
    def device_id(self) -> str:
        """Its name."""
        return self.info.device_id

    @property
    def lapsed(self) -> bool:
        """Whether its lease has ended, and with it the job that it had."""
        return self.lease_end <= now_us()

    @cached_property
    def machine(self) -> Machine:
        """What decides what it can build and run."""
        return machine_of(self.info)


class Place(Enum):
    """Where a job without a device is."""

    NOWHERE = "it has not been started, or has ended"
    EVALUATOR = "it was started at the configured evaluator"


def machine_of(info: devices_pb2.DeviceInfo) -> Machine:
    """Return a device as the rules of `granq.engines.fit` look at it."""
    gpu = Gpu(info.gpu, info.compute_capability, info.gpu_memory_bytes) if info.compute_capability else None
    runtimes: dict[int, str] = {runtime.runtime: runtime.version for runtime in info.runtimes}
    return Machine(info.platform, gpu, info.driver_version, runtimes)


class DeviceTable:
    """Reads and writes of the pool.

    Args:
        engine: The coordinator's database.
        terms: Of the leases.

    Attributes:
        terms: As given.
    """

    def __init__(self, engine: Engine, terms: Terms) -> None:
        self.terms = terms
        self._engine = engine

    def register(self, info: devices_pb2.DeviceInfo, instance_id: str, replaces: str) -> None:
        """Enter a device, or the new state of one that is known.

        Raises:
            FailedPreconditionError: Another instance, which is not the one that this one replaces, has the lease.
        """
        now = now_us()
        with Session(self._engine) as session, session.begin():
            row = session.get(DeviceRow, info.device_id, with_for_update=True)
            if row is None:
                row = DeviceRow(device_id=info.device_id, create_time=now)
                session.add(row)
            elif row.instance_id not in (instance_id, replaces) and row.lease_end > now:
                seconds = (row.lease_end - now) / _MICROSECONDS
                raise FailedPreconditionError(
                    f"another evaluator is registered as {info.device_id!r}; give each device an id of its own. If "
                    f"that one is gone, this one is admitted in {seconds:.0f} s",
                    reason="DEVICE_ID_TAKEN",
                    field="info.device_id",
                )
            row.instance_id, row.info = instance_id, info.SerializeToString(deterministic=True)
            row.last_seen, row.lease_end = now, now + self.terms.held_us

    def renew(self, device_id: str, instance_id: str) -> None:
        """Note a heartbeat.

        Raises:
            NotFoundError: The instance is not registered, or has said goodbye.
        """
        now = now_us()
        mine = (DeviceRow.device_id == device_id, DeviceRow.instance_id == instance_id, DeviceRow.lease_end > 0)
        renewed = update(DeviceRow).where(*mine).values(last_seen=now, lease_end=now + self.terms.held_us)
        with Session(self._engine) as session, session.begin():
            if not session.execute(renewed).rowcount:  # type: ignore[attr-defined]
                raise not_registered(device_id)

    def leave(self, device_id: str, instance_id: str) -> None:
        """Note a goodbye: the device has ended its jobs."""
        mine = (DeviceRow.device_id == device_id, DeviceRow.instance_id == instance_id)
        with Session(self._engine) as session, session.begin():
            session.execute(update(DeviceRow).where(*mine).values(lease_end=0))

    def remove(self, device_id: str) -> None:
        """Forget a device.

        Raises:
            NotFoundError: There is none of this name.
            FailedPreconditionError: It is there, or its lease has not ended.
        """
        with Session(self._engine) as session, session.begin():
            row = session.get(DeviceRow, device_id, with_for_update=True)
            if row is None:
                raise NotFoundError(f"there is no device {device_id!r}", field="device_id")
            if row.lease_end > now_us():
                raise FailedPreconditionError(
                    f"device {device_id!r} has a lease; stop its evaluator first, and wait until the lease has ended",
                    reason="DEVICE_PRESENT",
                    field="device_id",
                )
            session.delete(row)

    def all(self) -> list[DeviceRecord]:
        """Return all devices by their ids."""
        with read_session(self._engine) as session:
            return [_record(row) for row in session.scalars(select(DeviceRow).order_by(DeviceRow.device_id))]

    def find(self, job_id: str) -> DeviceRecord | None:
        """Return the device that a job has, if any."""
        with read_session(self._engine) as session:
            row = session.scalars(select(DeviceRow).where(DeviceRow.job_id == job_id)).one_or_none()
            return None if row is None else _record(row)

    def place(self, pipeline_id: str, job_id: str) -> DeviceRecord | Place:
        """Return where a job is: with a claim on a device there, else at the evaluator if it is open."""
        with read_session(self._engine) as session:
            row = session.scalars(select(DeviceRow).where(DeviceRow.job_id == job_id)).one_or_none()
            if row is not None:
                return _record(row)
            started = session.get(JobRow, (pipeline_id, job_id))
            return Place.NOWHERE if started is None else Place.EVALUATOR

    def claim(self, device_id: str, instance_id: str, pipeline_id: str, job_id: str) -> bool:
        """Give a job a device, and take the one away that it had before if the lease of that one has ended.

        Returns:
            Whether the job has the device now.
        """
        now = now_us()
        try:
            with Session(self._engine) as session, session.begin():
                held = session.scalars(select(DeviceRow).where(DeviceRow.job_id == job_id).with_for_update()).first()
                if held is not None and held.device_id == device_id:
                    return True
                if held is not None and held.lease_end > now:
                    return False
                if held is not None:
                    _free(held)
                    session.flush()
                row = session.get(DeviceRow, device_id, with_for_update=True)
                wanted = row is not None and row.instance_id == instance_id and row.job_id is None
                if row is None or not wanted or row.lease_end <= now:
                    session.rollback()
                    return False
                row.job_id, row.pipeline_id, row.claim_time = job_id, pipeline_id, now
                return True
        except IntegrityError:  # another coordinator gave the job a device at the same moment
            return False

    def release(self, job_id: str) -> None:
        """Free the device of a job that has ended."""
        with Session(self._engine) as session, session.begin():
            row = session.scalars(select(DeviceRow).where(DeviceRow.job_id == job_id).with_for_update()).first()
            if row is not None:
                _free(row)

    def release_unwanted(self, job_id: str, pipeline_id: str) -> bool:
        """Free the device of a job that has ended, unless its pipeline, retried meanwhile, wants it again."""
        with Session(self._engine) as session, session.begin():
            pipeline = session.get(PipelineRow, pipeline_id, with_for_update=True)
            if pipeline is not None and pipeline.state not in ENDED:
                return False
            row = session.scalars(select(DeviceRow).where(DeviceRow.job_id == job_id).with_for_update()).first()
            if row is not None:
                _free(row)
            return True

    def unwanted(self) -> list[DeviceRecord]:
        """Return the devices that a job of a pipeline has which has ended or is gone."""
        wanted = select(PipelineRow.pipeline_id).where(PipelineRow.state.not_in(ENDED))
        query = select(DeviceRow).where(DeviceRow.job_id.is_not(None), DeviceRow.pipeline_id.not_in(wanted))
        with read_session(self._engine) as session:
            return [_record(row) for row in session.scalars(query)]


def not_registered(device_id: str) -> NotFoundError:
    """Return the error for an instance that is not in the pool."""
    return NotFoundError(
        f"this instance of device {device_id!r} is not registered; register it",
        reason="DEVICE_UNKNOWN",
        field="device_id",
    )


def _free(row: DeviceRow) -> None:
    row.job_id = row.pipeline_id = row.claim_time = None


def _record(row: DeviceRow) -> DeviceRecord:
    return DeviceRecord(
        info=devices_pb2.DeviceInfo.FromString(row.info),
        instance_id=row.instance_id,
        last_seen=row.last_seen,
        lease_end=row.lease_end,
        create_time=row.create_time,
        job_id=row.job_id or "",
        pipeline_id=row.pipeline_id or "",
        claim_time=row.claim_time or 0,
    )
