"""The coordinator's own tables: pipelines, their events, and the worker jobs they started.

Messages are kept as protobuf bytes: the contract evolves compatibly by itself, so a new field needs no migration here.
A change of these classes needs a revision in `migrations/versions`; a test compares the two.
"""

from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Declarative base of the coordinator's tables."""


class SchemaRow(Base):
    """Turns away coordinators from before there were revisions, which read the version here; nothing else reads it."""

    __tablename__ = "coordinator_schema"

    version: Mapped[int] = mapped_column(primary_key=True)


class IdentityRow(Base):
    """The one row that names this database, for the artifact store."""

    __tablename__ = "database_identity"

    identity: Mapped[str] = mapped_column(String(32), primary_key=True)


class PipelineRow(Base):
    """One pipeline. Its row is the source of truth; the workflow engine only drives it."""

    __tablename__ = "pipelines"

    pipeline_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    # Who submitted it; "" on a coordinator that asks nobody.
    owner: Mapped[str] = mapped_column(String(300), default="", server_default="")
    # As the client chose it, where there is no owner; else its hash with the owner, since each has names of its own.
    request_id: Mapped[str | None] = mapped_column(String(128), unique=True)
    # The two large columns are read only where they are asked for: progress touches a row twice a second.
    spec: Mapped[bytes] = mapped_column(LargeBinary, deferred=True)
    state: Mapped[int]
    stage: Mapped[int] = mapped_column(default=0)
    # Fencing token: counts the workflows that drove this pipeline. A write made on behalf of an older one is refused.
    attempt: Mapped[int] = mapped_column(default=1)
    executor_id: Mapped[str] = mapped_column(String(128))
    last_sequence: Mapped[int] = mapped_column(BigInteger, default=0)
    progress: Mapped[bytes | None] = mapped_column(LargeBinary)
    failure: Mapped[bytes | None] = mapped_column(LargeBinary)
    results: Mapped[bytes] = mapped_column(LargeBinary, default=b"", deferred=True)
    # Stages whose result is in `results`, as a bit set over the numbers of granq.v1.Stage.
    finished_stages: Mapped[int] = mapped_column(default=0)
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    # Microseconds since the epoch, UTC.
    deadline: Mapped[int | None] = mapped_column(BigInteger)
    create_time: Mapped[int] = mapped_column(BigInteger)
    start_time: Mapped[int | None] = mapped_column(BigInteger)
    end_time: Mapped[int | None] = mapped_column(BigInteger)

    __table_args__ = (
        Index("pipelines_by_owner", "owner", "create_time", "pipeline_id"),
        Index("pipelines_newest", "create_time", "pipeline_id"),
        Index("pipelines_by_state", "state", "create_time", "pipeline_id"),
    )


class GrantRow(Base):
    """An artifact that somebody may see, and the pipeline that made it for him; "" where he uploaded it."""

    __tablename__ = "artifact_grants"

    owner: Mapped[str] = mapped_column(String(300), primary_key=True)
    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    pipeline_id: Mapped[str] = mapped_column(String(64), primary_key=True)

    __table_args__ = (Index("artifact_grants_by_pipeline", "pipeline_id"),)


class EventRow(Base):
    """One event of a pipeline; written in the transaction that made the change it tells of."""

    __tablename__ = "pipeline_events"

    pipeline_id: Mapped[str] = mapped_column(ForeignKey("pipelines.pipeline_id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    time: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[int]
    stage: Mapped[int]
    progress: Mapped[bytes | None] = mapped_column(LargeBinary)
    failure: Mapped[bytes | None] = mapped_column(LargeBinary)


class JobRow(Base):
    """A worker job that may still run; the row goes when the job is known to have ended."""

    __tablename__ = "pipeline_jobs"

    pipeline_id: Mapped[str] = mapped_column(ForeignKey("pipelines.pipeline_id", ondelete="CASCADE"), primary_key=True)
    job_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    worker: Mapped[str] = mapped_column(String(32))
    # How far the job's events were read, so that a restarted coordinator goes on from there.
    run_id: Mapped[str] = mapped_column(String(64), default="")
    sequence: Mapped[int] = mapped_column(BigInteger, default=0)


class DeviceRow(Base):
    """A device that has registered, and the job that has it. A job has one device at most, and a device one job."""

    __tablename__ = "devices"

    device_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    # The process on the device; another one's heartbeat is refused.
    instance_id: Mapped[str] = mapped_column(String(64))
    info: Mapped[bytes] = mapped_column(LargeBinary)
    last_seen: Mapped[int] = mapped_column(BigInteger)
    # Until then its job must not begin elsewhere; 0 once it has said goodbye.
    lease_end: Mapped[int] = mapped_column(BigInteger)
    create_time: Mapped[int] = mapped_column(BigInteger)
    job_id: Mapped[str | None] = mapped_column(String(128), unique=True)
    # No foreign key: the device stays taken until its job is known to have ended, also when its pipeline is deleted.
    pipeline_id: Mapped[str | None] = mapped_column(String(64))
    claim_time: Mapped[int | None] = mapped_column(BigInteger)
