"""Settings of the evaluator."""

import re
import socket
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from services.common.settings import ServerSettings

_ALL_INTERFACES = ("0.0.0.0", "::", "")  # noqa: S104
_NOT_OF_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def _host_name() -> str:
    return _NOT_OF_A_NAME.sub("-", socket.gethostname()).strip("-._")[:63] or "device"


class EvaluatorSettings(ServerSettings):
    """Settings of the evaluator; see ServerSettings for where values come from."""

    port: int = Field(default=50053, ge=0, le=65535, description="Port of the RPCs; 0 lets the system choose.")
    dataset_root: Path = Field(
        default_factory=lambda: Path.cwd() / "granq-data" / "datasets",
        description="Folder that Dataset.path is relative to; requests cannot leave it.",
    )
    onnx_threads: int = Field(
        default=0, ge=0, le=1024, description="Threads of ONNX Runtime; 0 uses one for each physical core."
    )
    latency_repeats: int = Field(default=20, ge=1, le=1000, description="Timed runs of a batch, at most.")
    latency_seconds: float = Field(
        default=10.0, gt=0, le=3600, description="Time in seconds after which no further timed run begins."
    )
    build_seconds: float = Field(
        default=3600.0, gt=0, le=86400, description="Time in seconds after which an engine build is ended as failed."
    )
    coordinator_address: str = Field(
        default="",
        pattern=r"^([^\s:/]+:\d{1,5}|\[[0-9A-Fa-f:.]+\]:\d{1,5})?$",
        description="host:port of the coordinator whose pool of devices this evaluator enters. Default: none.",
    )
    dial_out: bool = Field(
        default=False,
        description="Whether this evaluator takes its jobs over a stream that it opens to the coordinator, because the "
        "coordinator cannot dial it. Artifacts go through the coordinator, too, unless artifact_url is given.",
    )
    device_id: str = Field(
        default_factory=_host_name,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="Name in the pool, stable over restarts, unique among its devices. Default: the host's name.",
    )
    device_address: str = Field(
        default="",
        pattern=r"^([^\s:/]+:\d{1,5}|\[[0-9A-Fa-f:.]+\]:\d{1,5})?$",
        description="host:port at which the coordinator dials this evaluator. Default: host and port of the settings.",
    )
    device_targets: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        max_length=64,
        description="Names of the engine targets that this device is meant for, with commas between. Default: all that "
        "it can build or run.",
    )
    device_labels: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict,
        max_length=32,
        description="What people want to know of this device, such as place=lab-2,owner=vision.",
    )

    @field_validator("device_targets", mode="before")
    @classmethod
    def _split_targets(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("device_labels", mode="before")
    @classmethod
    def _split_labels(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        if not all(separator and key.strip() for key, separator, _ in pairs):
            raise ValueError(f"labels are key=value with commas between, got {value!r}")
        return {key.strip(): text.strip() for key, _, text in pairs}

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.dial_out and not self.coordinator_address:
            raise ValueError("dial_out needs coordinator_address, the host:port to dial")
        if self.coordinator_address and not self.dial_out and not self.device_address and self.host in _ALL_INTERFACES:
            raise ValueError(
                f"host {self.host} is no address to dial: give device_address, or set dial_out where the coordinator "
                "cannot dial this evaluator"
            )
        return self
