"""Engine builds, from the job's side: one process each, followed, bounded in time, cancellable and audited."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Protocol

from services.common.errors import (
    FailedPreconditionError,
    GranqError,
    InternalError,
    ResourceExhaustedError,
    UnavailableError,
)
from services.evaluator.build_spec import BuildOutcome, BuildSpec, parse_line
from services.evaluator.graph import Graph
from services.evaluator.inspector_audit import audit_inspector
from services.evaluator.plan_audit import FloatLayer, PlanAudit, audit_plan, why_float
from services.evaluator.runtimes import EngineRuntime

_POLL_SECONDS = 0.1
_EXIT_SECONDS = 10.0
_TAIL_BYTES = 2000


class Follower(Protocol):
    """Who waits for a build. A JobContext is one; a device has no jobs, nor what they need."""

    @property
    def log(self) -> Any:
        """Logger with structlog's methods."""

    def report(self, phase: str, step: int = 0, total: int = 0) -> None:
        """Take the progress: steps done of the steps in all, 0 where unknown."""

    def check_cancelled(self) -> None:
        """Raise CancelledError when the build must stop."""


def run_build(spec: BuildSpec, context: Follower, seconds: float) -> BuildOutcome:
    """Build in a fresh process and wait for it.

    Args:
        spec: What to build.
        context: Gets the progress, and stops the build when the job is cancelled.
        seconds: Time after which the build has failed.

    Raises:
        CancelledError: The job was cancelled; the process is gone.
        UnavailableError: A signal ended the process.
        InternalError: The process failed by a defect; the log has its output.
        ResourceExhaustedError: It took too long.
        GranqError: What the build itself reported.
    """
    reader, writer = os.pipe()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-P", "-m", "services.evaluator.build_process", str(writer)]
    with os.fdopen(reader, "rb", buffering=0) as channel, TemporaryFile() as output:
        try:
            process = subprocess.Popen(  # noqa: S603 - a fixed command; the request's values travel as JSON
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=(writer,), env=environment
            )
        finally:
            os.close(writer)
        try:
            assert process.stdin is not None  # noqa: S101 - it was asked for
            process.stdin.write(json.dumps(asdict(spec)).encode() + b"\n")
            process.stdin.close()
            outcome = _follow(channel, context, time.monotonic() + seconds)
        except BrokenPipeError:
            outcome = None
        except BaseException:
            process.kill()
            raise
        finally:
            code = _exit_code(process)
        if outcome is None:
            context.log.error("engine build process died", exit_code=code, output=_tail(output))
            if code >= 0:
                raise InternalError(f"the process of the engine build ended with exit code {code}")
            name = signal.Signals(-code).name
            raise UnavailableError(
                f"the process of the engine build was ended by {name}", reason="ENGINE_BUILD_PROCESS_DIED"
            )
        return outcome


def _follow(channel: IO[bytes], context: Follower, end: float) -> BuildOutcome | None:
    """Read messages until the result; return None when the process ends without one."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        while True:
            context.check_cancelled()
            if time.monotonic() > end:
                raise ResourceExhaustedError(
                    "the engine build took longer than this evaluator allows (GRANQ_BUILD_SECONDS)",
                    reason="ENGINE_BUILD_TIMEOUT",
                )
            if not selector.select(_POLL_SECONDS):
                continue
            data = channel.read(1 << 16)
            if not data:
                return None
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                message = parse_line(line)
                if isinstance(message, BuildOutcome):
                    return message
                if isinstance(message, GranqError):
                    raise message
                phase, step, total = message
                context.report(f"building: {phase}", step, total)


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process that has said all it will, so that it ends by itself and its code tells why."""
    try:
        return process.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _tail(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _TAIL_BYTES))
    return output.read().decode(errors="replace")


def check_warnings(runtime: EngineRuntime, warnings: list[str]) -> dict[str, str]:
    """Return the warnings that a build is passed in spite of, each with the reason.

    Raises:
        FailedPreconditionError: The build warned of something that is not listed as harmless.
    """
    verdicts = {warning.strip(): runtime.why_harmless(warning) for warning in warnings}
    serious = [warning for warning, reason in verdicts.items() if reason is None]
    if serious:
        raise FailedPreconditionError(
            f"{runtime.module} built an engine that may not compute what the graph says: {'; '.join(serious)}",
            reason="ENGINE_BUILD_WARNING",
        )
    return {warning: reason for warning, reason in verdicts.items() if reason is not None}


def check_graph(graph: Graph) -> None:
    """Raise FailedPreconditionError when convolutions are stored in a form that no integer kernel runs; names them."""
    _refuse_floats([FloatLayer(layer, why) for layer in graph.layers if (why := why_float(layer))], "the graph stores")


def check_plan(runtime: EngineRuntime, graph: Graph, spec: BuildSpec) -> PlanAudit | None:
    """Audit a built engine: by its inspector where the runtime has one, else by the plan's own text.

    Returns:
        The audit, or None where neither tells.

    Raises:
        FailedPreconditionError: A convolution came out in float.
    """
    if spec.layers is not None:
        audit = audit_inspector(Path(spec.layers).read_text("utf-8", errors="replace"), graph.layers)
    else:
        low, _, high = spec.batch
        audit = audit_plan(Path(spec.plan).read_bytes(), graph.layers, low if low == high else None)
    if audit is not None:
        _refuse_floats(audit.floats, f"{runtime.module} built")
    return audit


def _refuse_floats(layers: Sequence[FloatLayer], who: str) -> None:
    # Linear layers are counted but not refused: a classifier's last layer in float costs next to nothing.
    names = [f"{found.layer.name} ({found.reason})" for found in layers if found.layer.kind == "Conv"]
    if names:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        remedy = (
            "store their weights as INT8 codes, and give their inputs one scale"
            if any(why_float(found.layer) for found in layers)
            else "build for other compute capabilities, or with another runtime"
        )
        raise FailedPreconditionError(
            f"{who} convolutions in floating point that should be INT8: {', '.join(names[:10])}{more}; {remedy}",
            reason="LAYER_NOT_INT8",
            field="onnx_trt",
        )
