"""Settings of the quantizer."""

from pathlib import Path

from pydantic import Field

from services.common.settings import ServerSettings


class QuantizerSettings(ServerSettings):
    """Settings of the quantizer, prefix GRANQ_."""

    port: int = Field(default=50052, ge=0, le=65535, description="Port of the RPCs; 0 lets the system choose.")
    generator_address: str = Field(
        default="127.0.0.1:50051", description="host:port of the generator, for joint training."
    )
    dataset_root: Path = Field(
        default_factory=lambda: Path.cwd() / "granq-data" / "datasets",
        description="Folder that Dataset.path is relative to; requests cannot leave it.",
    )
    torch_threads: int = Field(
        default=0, ge=0, le=1024, description="CPU threads of a job; 0 takes PyTorch's default, the number of cores."
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Where jobs compute; auto takes CUDA if present.",
    )
    ranks: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that train a student together, each on its part of a batch and on a GPU of its own; on "
        "a CPU they share its cores.",
    )
    bfloat16: bool = Field(
        default=False,
        description="Whether layers of simulated students compute in bfloat16 while they are trained. Faster on a CPU "
        "that has instructions for it (AVX512_BF16, AMX).",
    )
