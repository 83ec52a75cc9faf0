"""The process of one engine build: `python -m services.evaluator.build_process FD`, a BuildSpec on standard input.

Each build has its own process, because a build that failed can leave state behind that makes the runtime silently drop
INT8 in the next one (seen with TensorRT-RTX 1.7), and because a crash or a kill then ends the build alone.
"""

import ctypes
import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.common.errors import FailedPreconditionError, GranqError, InvalidArgumentError, ResourceExhaustedError
from services.evaluator.build_spec import (
    BuildOutcome,
    BuildSpec,
    BuiltTensor,
    error_line,
    outcome_line,
    progress_line,
)

FIELD = "onnx_trt"
_PR_SET_PDEATHSIG = 1


def build(spec: BuildSpec, report: Callable[[str, int, int], None]) -> BuildOutcome:
    """Build an engine and write it to ``spec.plan``.

    Args:
        spec: What to build.
        report: Takes the builder's phase, its steps done and its steps in all; called from the builder's threads.

    Raises:
        FailedPreconditionError: The runtime cannot be loaded, does not know a compute capability, or refuses or fails
            to build; its messages are included.
        InvalidArgumentError: The graph cannot be parsed.
    """
    start = time.perf_counter()
    try:
        trt = importlib.import_module(spec.module)
    except (ImportError, OSError) as error:
        raise FailedPreconditionError(f"{spec.module} is installed but cannot be loaded: {error}") from error
    log = _log_of(trt)
    builder = _created(lambda: trt.Builder(log), log)
    flags = 0
    if int(trt.__version__.split(".")[0]) in spec.strong_typing_majors:
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = _created(lambda: builder.create_network(flags), log)
    parser = trt.OnnxParser(network, log)
    # parse() of bytes, unlike parse_from_file(), never looks for files beside the graph.
    if not parser.parse(Path(spec.onnx).read_bytes()):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise InvalidArgumentError(f"{spec.module} cannot parse the graph: {_joined(errors + log.errors)}", field=FIELD)
    config = _created(builder.create_builder_config, log)
    _configure(trt, config, spec)
    cache = _use_timing_cache(config, Path(spec.timing_cache), log) if spec.timing_cache is not None else None
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        fixed = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, *((batch, *fixed) for batch in spec.batch))
    if config.add_optimization_profile(profile) < 0:
        raise FailedPreconditionError(f"{spec.module} refuses the batch profile: {_joined(log.errors)}", field="target")
    monitor = _monitor_of(trt, report)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise FailedPreconditionError(
            f"{spec.module} could not build the engine: {_joined(log.errors + log.warnings)}",
            reason="ENGINE_BUILD_FAILED",
        )
    Path(spec.plan).write_bytes(plan)
    if spec.layers is not None:
        Path(spec.layers).write_text(_kernels_of(trt, plan, spec.batch[1], log), "utf-8")
    if cache is not None and spec.timing_cache is not None:
        Path(spec.timing_cache).write_bytes(cache.serialize())
    tensors = [_described(network.get_input(i), True) for i in range(network.num_inputs)]
    tensors += [_described(network.get_output(i), False) for i in range(network.num_outputs)]
    return BuildOutcome(str(trt.__version__), tensors, log.warnings, time.perf_counter() - start)


def _configure(trt: Any, config: Any, spec: BuildSpec) -> None:
    if spec.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_bytes)
    if spec.optimization_level is not None:
        config.builder_optimization_level = spec.optimization_level
    if spec.layers is not None:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not spec.capabilities:
        return
    known = {
        f"{name[2:-1]}.{name[-1]}": member
        for name, member in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    unknown = [c for c in spec.capabilities if c not in known]
    if unknown:
        raise FailedPreconditionError(
            f"{spec.module} {trt.__version__} builds for {', '.join(known)}, not for {', '.join(unknown)}",
            reason="TARGET_UNSUPPORTED",
            field="target.compute_capabilities",
        )
    config.num_compute_capabilities = len(spec.capabilities)
    for index, capability in enumerate(spec.capabilities):
        config.set_compute_capability(known[capability], index)


def _use_timing_cache(config: Any, path: Path, log: Any) -> Any:
    """Give the builder a cache and return it: the stored one, or an empty one where there is none or it is refused."""
    messages = len(log.warnings), len(log.errors)
    stored = [path.read_bytes()] if path.exists() else []
    for content in (*stored, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            # What was said of a cache that is not used has no part in this build.
            del log.warnings[messages[0] :], log.errors[messages[1] :]
            return cache
    return None


def _kernels_of(trt: Any, plan: Any, batch: int, log: Any) -> str:
    """Return the kernels of an engine as JSON, for one batch: without it, the inspector shows no formats of tensors."""
    runtime = _created(lambda: trt.Runtime(log), log)
    engine = _created(lambda: runtime.deserialize_cuda_engine(plan), log)
    context = _created(engine.create_execution_context, log)
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            context.set_input_shape(name, (batch, *tuple(engine.get_tensor_shape(name))[1:]))
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _log_of(trt: Any) -> Any:
    """Return a logger that keeps errors and warnings instead of printing them."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)

    return Log()


def _monitor_of(trt: Any, report: Callable[[str, int, int], None]) -> Any:
    """Return a progress monitor that reports the outermost phase; the phases within it come and go too fast to show."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._outer: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._outer[phase_name] = num_steps
                report(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._outer:
                report(phase_name, step + 1, self._outer[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._outer.pop(phase_name, None)

    return Monitor()


def _created(create: Callable[[], Any], log: Any) -> Any:
    """Return what the library creates. For want of a driver it creates nothing, and the bindings raise TypeError."""
    try:
        made = create()
    except TypeError as error:
        raise FailedPreconditionError(f"the runtime cannot start here: {_joined([*log.errors, str(error)])}") from error
    if made is None:
        raise FailedPreconditionError(f"the runtime cannot start here: {_joined(log.errors)}")
    return made


def _described(tensor: Any, is_input: bool) -> BuiltTensor:
    return BuiltTensor(tensor.name, is_input, str(tensor.dtype).rpartition(".")[2], list(tensor.shape))


def _joined(messages: list[str]) -> str:
    return "; ".join(dict.fromkeys(m.strip() for m in messages if m.strip())) or "it gave no reason"


def main() -> int:
    """Run the build that standard input describes, and write progress and result to the given file descriptor."""
    parent = os.getppid()
    if sys.platform == "linux":
        # A build must not outlive its job, which may be killed without a chance to say so.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    spec = BuildSpec(**json.loads(sys.stdin.buffer.readline()))
    if os.getppid() != parent:
        return 1
    lock = threading.Lock()
    with os.fdopen(int(sys.argv[1]), "wb", buffering=0) as channel:

        def send(line: bytes) -> None:
            with lock:
                channel.write(line)

        try:
            send(outcome_line(build(spec, lambda phase, step, total: send(progress_line(phase, step, total)))))
        except GranqError as error:
            send(error_line(error))
        except (MemoryError, OSError) as error:
            known = _no_room(error, Path(spec.plan).parent)
            if known is None:
                raise
            send(error_line(known))
    return 0


def _no_room(error: MemoryError | OSError, folder: Path) -> ResourceExhaustedError | None:
    """Return what to say of a machine that has no room for the build; None for other failures of the system."""
    if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
        return ResourceExhaustedError("there is no memory for this build", reason="OUT_OF_MEMORY")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhaustedError(f"the disk with {folder} is full; free space and try again", reason="DISK_FULL")
    return None


if __name__ == "__main__":
    sys.exit(main())
