"""Settings of the generator."""

import os

from pydantic import Field

from services.common.settings import ServerSettings


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _half_of_the_cores() -> int:
    return max(1, _cores() // 2)


class GeneratorSettings(ServerSettings):
    """Settings of the generator's server."""

    port: int = Field(default=50051, ge=0, le=65535, description="Port of the RPCs; 0 lets the system choose.")
    torch_threads: int = Field(
        default_factory=_half_of_the_cores,
        ge=1,
        le=1024,
        description="CPU threads of a joint training. Default: half of the cores; the quantizer has the others.",
    )
    synthesis_threads: int = Field(
        default_factory=_cores, ge=1, le=1024, description="CPU threads of a synthesis job. Default: all cores."
    )
    max_co_train_streams: int = Field(
        default=2, ge=1, le=256, description="CoTrain streams served at once; more fail with RESOURCE_EXHAUSTED."
    )
    co_train_wait_seconds: float = Field(
        default=5.0,
        ge=0,
        le=600,
        description="Time in seconds that a CoTrain stream waits for a place before it fails.",
    )
    bfloat16: bool = Field(
        default=False,
        description="Whether the layers of generator and teacher compute in bfloat16 in a joint training. Faster on a "
        "CPU that has instructions for it (AVX512_BF16, AMX).",
    )
