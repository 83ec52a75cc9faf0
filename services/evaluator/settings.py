"""Settings of the evaluator."""

from pathlib import Path

from pydantic import Field

from services.common.settings import ServerSettings


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
