"""Settings of the coordinator."""

from importlib.metadata import version
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from services.common.errors import InvalidArgumentError
from services.common.settings import ServerSettings
from services.coordinator.database import parse_url


class CoordinatorSettings(ServerSettings):
    """Settings of one coordinator process."""

    port: int = Field(default=50050, ge=0, le=65535, description="Port of the RPCs; 0 lets the system choose.")
    database_url: str = Field(
        default_factory=lambda: f"sqlite:///{Path.cwd() / 'granq-data' / 'coordinator.sqlite'}",
        description="Where pipelines are kept: sqlite:////path/to/file, or postgresql://user:password@host/database.",
    )
    executor_id: str = Field(
        default="coordinator",
        min_length=1,
        max_length=128,
        description="Name of this coordinator, stable over its restarts; unique among those of one database.",
    )
    application_version: str = Field(
        default_factory=lambda: version("granq-pipeline"),
        min_length=1,
        max_length=128,
        description="Version of the workflow code. Pipelines begun by another version are driven anew by this one.",
    )
    generator_address: str = Field(default="127.0.0.1:50051", description="host:port of the generator.")
    quantizer_address: str = Field(default="127.0.0.1:50052", description="host:port of the quantizer.")
    evaluator_address: str = Field(default="127.0.0.1:50053", description="host:port of the evaluator.")
    lock_seconds: float = Field(
        default=10.0, ge=0, le=600, description="How long to wait at the start for a predecessor of this id to end."
    )
    max_running_pipelines: int = Field(
        default=64, ge=1, le=10_000, description="Pipelines driven at once; more stay QUEUED. Workers queue jobs, too."
    )
    max_generator_jobs: int = Field(
        default=64, ge=1, le=10_000, description="Jobs at the generators at once; more wait here, by priority."
    )
    max_quantizer_jobs: int = Field(
        default=64, ge=1, le=10_000, description="Jobs at the quantizers at once; more wait here, by priority."
    )
    max_evaluator_jobs: int = Field(
        default=64, ge=1, le=10_000, description="Jobs at the evaluators at once; more wait here, by priority."
    )
    rpc_timeout_seconds: float = Field(default=20.0, gt=0, le=600, description="Deadline of a short call to a worker.")
    watch_timeout_seconds: float = Field(
        default=600.0, gt=0, le=86_400, description="Deadline of one stream of a job's events; it is opened again."
    )
    unavailable_seconds: float = Field(
        default=600.0, ge=0, le=86_400, description="How long a worker may be away before the pipeline fails."
    )
    max_crashes: int = Field(
        default=3, ge=1, le=100, description="Times in a row that a job's process may die without a step of progress."
    )
    cancel_seconds: float = Field(
        default=4.0, gt=0, le=60, description="Longest wait for a worker to end a cancelled job."
    )
    sweep_seconds: float = Field(
        default=30.0, gt=0, le=3600, description="Time between searches for pipelines that nobody drives."
    )
    device_heartbeat_seconds: float = Field(
        default=10.0,
        gt=0,
        le=600,
        description="Time between heartbeats of a device; after three it counts as away.",
    )
    device_lease_seconds: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="Time after which a silent device has ended its job; a quarter later the job may begin elsewhere.",
    )
    device_patience_seconds: float = Field(
        default=900.0,
        ge=0,
        le=7 * 86_400,
        description="How long a job waits while all devices that it could have are away; then its target fails.",
    )
    device_poll_seconds: float = Field(
        default=1.0, gt=0, le=60, description="Time between looks at the pool, for what other coordinators changed."
    )
    retention_seconds: float | None = Field(
        default=None, ge=0, description="Age, since their end, at which pipelines are deleted. Default: never."
    )
    artifact_grace_seconds: float = Field(
        default=3600.0, ge=60, description="Least age of artifacts that nothing refers to before they are removed."
    )
    upload_seconds: float = Field(
        default=86_400.0, ge=60, description="Time that an upload is kept before a pipeline names it."
    )
    job_record_seconds: float = Field(
        default=7 * 86_400.0, ge=60, description="Time that results of jobs which belong to no pipeline are kept."
    )
    tidy_seconds: float = Field(
        default=600.0, gt=0, le=86_400, description="Time between two removals of what nothing refers to."
    )
    max_artifact_bytes: int = Field(
        default=16 * 1024**3, ge=1, description="Largest upload in bytes; larger ones are refused."
    )

    @model_validator(mode="after")
    def _lease_outlasts_heartbeats(self) -> Self:
        if self.device_lease_seconds < 3 * self.device_heartbeat_seconds:
            raise ValueError(
                f"device_lease_seconds {self.device_lease_seconds:g} must be three times device_heartbeat_seconds "
                f"{self.device_heartbeat_seconds:g}, or more"
            )
        return self

    @field_validator("database_url")
    @classmethod
    def _supported(cls, value: str) -> str:
        try:
            parse_url(value)
        except InvalidArgumentError as error:
            raise ValueError(error.message) from error
        return value
