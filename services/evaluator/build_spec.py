"""What passes between a build's process and the job that waits for it, as JSON."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from services.common.errors import FailedPreconditionError, GranqError, InvalidArgumentError, ResourceExhaustedError


@dataclass(frozen=True)
class BuildSpec:
    """One engine build.

    Attributes:
        module: Python module of the runtime.
        strong_typing_majors: As EngineRuntime.strong_typing_majors.
        onnx: Path of the graph.
        plan: Path to write the engine to.
        batch: Smallest, tuned-for and largest batch.
        capabilities: Compute capabilities such as "8.6"; empty for the runtime's default.
        workspace_bytes: Memory for tactics in bytes; None for the runtime's default.
        optimization_level: 0 to 5; None where the runtime has none.
        timing_cache: Path to read the timing cache from, where it exists, and to write it to; None for no cache.
        layers: Path to write the inspector's listing of the engine's kernels to; None where they are not listed.
    """

    module: str
    strong_typing_majors: list[int]
    onnx: str
    plan: str
    batch: list[int]
    capabilities: list[str]
    workspace_bytes: int | None
    optimization_level: int | None
    timing_cache: str | None = None
    layers: str | None = None


@dataclass(frozen=True)
class BuiltTensor:
    """An input or output of a built engine; −1 in the shape is the batch."""

    name: str
    input: bool
    data_type: str
    shape: list[int]


@dataclass(frozen=True)
class BuildOutcome:
    """What a build gave.

    Attributes:
        version: The runtime's version.
        tensors: Inputs and outputs.
        warnings: What the runtime warned of.
        seconds: Time of parsing and building.
    """

    version: str
    tensors: list[BuiltTensor]
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


_ERRORS = {cls.__name__: cls for cls in (FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError)}


def progress_line(phase: str, step: int, total: int) -> bytes:
    """Encode progress: steps done of those in the builder's current phase."""
    return _line({"progress": [phase, step, total]})


def outcome_line(outcome: BuildOutcome) -> bytes:
    """Encode a result."""
    return _line({"outcome": dataclasses.asdict(outcome)})


def error_line(error: GranqError) -> bytes:
    """Encode a failure."""
    return _line({"error": [type(error).__name__, error.message, error.reason, error.field]})


def parse_line(line: bytes) -> tuple[str, int, int] | BuildOutcome | GranqError:
    """Decode progress (phase, step, total), a result or a failure."""
    message: dict[str, Any] = json.loads(line)
    if "progress" in message:
        phase, step, total = message["progress"]
        return str(phase), int(step), int(total)
    if "error" in message:
        name, text, reason, name_of_field = message["error"]
        return _ERRORS.get(name, FailedPreconditionError)(text, reason=reason, field=name_of_field)
    outcome = message["outcome"]
    tensors = [BuiltTensor(**tensor) for tensor in outcome.pop("tensors")]
    return BuildOutcome(tensors=tensors, **outcome)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
