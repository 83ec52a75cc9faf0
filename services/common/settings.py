"""Settings that all servers share, read once from the environment (prefix GRANQ_)."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import SettingsConfigDict

from services.common.security import SecuritySettings, is_loopback

MIB = 1024 * 1024
CACHE_BYTES = 4096 * MIB
"""What local copies of remote artifacts may take by default: half of the `/tmp` that a pod has."""


class ServerSettings(SecuritySettings):
    """Settings of one server. Services subclass it and set their default port.

    A value comes from the constructor, else from the environment (GRANQ_PORT for `port`), else from the default.
    """

    model_config = SettingsConfigDict(env_prefix="GRANQ_", frozen=True, extra="forbid", validate_default=True)

    host: str = Field(default="127.0.0.1", description="Address to listen on for RPCs.")
    port: int = Field(default=0, ge=0, le=65535, description="Port of the RPCs; 0 lets the system choose.")
    metrics_port: int = Field(
        default=-1, ge=0, le=65535, description="Port of the metrics. Default: port + 1000, or 0 where port is 0."
    )
    health_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port that answers health checks alone, in plain text, for probes that know no TLS; 0 lets the "
        "system choose. Default: none; the port of the RPCs answers them, too.",
    )
    monitoring_host: str = Field(
        default="",
        description="Address of the metrics' and the health port, which everybody who reaches them may read. Default: "
        "host where that is loopback or allow_insecure is set, else 127.0.0.1.",
    )
    artifact_url: str = Field(
        default_factory=lambda: (Path.cwd() / "granq-data" / "artifacts").as_uri(),
        description="Folder or bucket of the artifact store, the same for all services: file://, s3://, gs:// or granq://coordinator:50050.",
    )
    cache_dir: Path | None = Field(
        default=None, description="Local copies of remote artifacts. Default: granq in the user's cache folder."
    )
    cache_bytes: int = Field(
        default=CACHE_BYTES,
        ge=0,
        description="What these copies may take, beside those in use; the ones used longest ago are removed first.",
    )
    ready_file: Path | None = Field(
        default=None,
        description='JSON file {"port", "metrics_port", "health_port", "pid"}, written once the server serves.',
    )
    log_format: Literal["console", "json"] = Field(default="console", description="For people or for programs.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Least level logged.")
    max_running_jobs: int = Field(default=1, ge=1, le=1024, description="Jobs that run at once; more are queued.")
    single_pipeline: bool = Field(
        default=False, description="After its first job, a worker takes jobs of the same pipeline alone, to its end."
    )
    exit_when_idle_seconds: float = Field(
        default=0.0,
        ge=0,
        le=7 * 86_400,
        description="Time without a job, a joint training or a watch of a job after which a worker ends by itself, "
        "with exit code 0; 0: never.",
    )
    grace_seconds: float = Field(
        default=10.0, ge=0, le=3600, description="Time in seconds for RPCs and jobs to end after SIGTERM."
    )
    read_seconds: float = Field(
        default=300.0, gt=0, le=24 * 3600, description="Longest time in seconds for a job to read a file from outside."
    )
    read_memory_bytes: int = Field(
        default=2048 * MIB,
        ge=256 * MIB,
        description="Memory in bytes for a job to read a file from outside, beside six times the file's size.",
    )
    lease_seconds: float = Field(
        default=20.0,
        ge=1,
        le=3600,
        description="Time after which another worker on the same store may run the job of one that gives no sign.",
    )
    max_message_bytes: int = Field(
        default=64 * MIB, ge=4 * MIB, le=1024 * MIB, description="Largest message in bytes, received or sent."
    )

    @field_validator("metrics_port", mode="before")
    @classmethod
    def _beside_port(cls, value: object, info: ValidationInfo) -> object:
        if value != -1:
            return value
        port = info.data.get("port", 0)
        return port + 1000 if port else 0

    @field_validator("monitoring_host")
    @classmethod
    def _beside_host(cls, value: str, info: ValidationInfo) -> str:
        host = str(info.data.get("host", ""))
        open_to_all = bool(info.data.get("allow_insecure")) or is_loopback(host)
        return value or (host if open_to_all else "127.0.0.1")
