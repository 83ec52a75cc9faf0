"""The two runtimes that build engines, and all in which they differ."""

import importlib.metadata
import re
from dataclasses import dataclass

from granq.engines.fit import BUILDS_FOR_OTHERS, is_version
from granq.engines.machine import (
    RUNTIME_PACKAGES,
    cpu_name,
    driver_version,
    find_gpu,
    installed_version,
    platform_name,
)
from granq.v1 import common_pb2, evaluator_pb2
from services.common.errors import FailedPreconditionError, InvalidArgumentError


@dataclass(frozen=True)
class Harmless:
    """A warning that a build may pass in spite of.

    Attributes:
        pattern: Regular expression found in its text.
        reason: Why it does not change what the engine computes.
    """

    pattern: str
    reason: str


@dataclass(frozen=True)
class EngineRuntime:
    """One builder of engines.

    Attributes:
        runtime: Its name in the contract.
        module: Python module.
        package: What pip installs.
        strong_typing_majors: Major versions in which a network must be asked to keep the graph's number formats; in
            later ones it always does.
        gpu_to_build: Whether the builder times kernels on the GPU that the engine will run on.
        capabilities: Compute capabilities of an engine when the request names none; empty where they are the GPU's.
        takes_capabilities: Whether an engine can be built for other GPUs than the one at hand.
        optimization_levels: Whether the builder has them.
        timing_cache: Whether the builder can keep what it measured for the next build.
        inspector: Whether an engine is loaded after its build to list its kernels, which takes the GPU that it is for;
            otherwise the plan's own text tells which weights stayed INT8.
        harmless_warnings: Warnings about speed or memory. Any other warning fails the build, because among them are
            those that say that numbers will differ (such as uint8 codes taken as int8).
    """

    runtime: common_pb2.Runtime
    module: str
    package: str
    strong_typing_majors: frozenset[int]
    gpu_to_build: bool
    capabilities: tuple[str, ...]
    takes_capabilities: bool
    optimization_levels: bool
    timing_cache: bool
    inspector: bool
    harmless_warnings: tuple[Harmless, ...]

    def version(self) -> str | None:
        """Return the installed version, or None; as installed_version."""
        return installed_version(self.module, self.package)

    def why_harmless(self, warning: str) -> str | None:
        """Return why a build may pass in spite of this warning, or None when it may not."""
        return next((known.reason for known in self.harmless_warnings if re.search(known.pattern, warning)), None)


_LAZY_LOADING = Harmless(r"CUDA lazy loading is not enabled", "kernels take more memory; what they compute is the same")
_UNKNOWN_MEMORY = Harmless(r"Unable to determine GPU memory usage", "there is no GPU here, or no memory counter")
_TACTIC_MEMORY = "a kernel is left out of the choice; all kernels offered compute the same"
TENSORRT = EngineRuntime(
    runtime=common_pb2.RUNTIME_TENSORRT,
    module=RUNTIME_PACKAGES[common_pb2.RUNTIME_TENSORRT][0],
    package=RUNTIME_PACKAGES[common_pb2.RUNTIME_TENSORRT][1],
    strong_typing_majors=frozenset({10}),
    gpu_to_build=common_pb2.RUNTIME_TENSORRT not in BUILDS_FOR_OTHERS,
    capabilities=(),
    takes_capabilities=common_pb2.RUNTIME_TENSORRT in BUILDS_FOR_OTHERS,
    optimization_levels=True,
    timing_cache=True,
    inspector=True,
    harmless_warnings=(
        _LAZY_LOADING,
        _UNKNOWN_MEMORY,
        Harmless(r"[Ss]kipping tactic .* due to insufficient memory", _TACTIC_MEMORY),
        Harmless(r"Device memory is insufficient to use tactic", _TACTIC_MEMORY),
    ),
)
TENSORRT_RTX = EngineRuntime(
    runtime=common_pb2.RUNTIME_TENSORRT_RTX,
    module=RUNTIME_PACKAGES[common_pb2.RUNTIME_TENSORRT_RTX][0],
    package=RUNTIME_PACKAGES[common_pb2.RUNTIME_TENSORRT_RTX][1],
    strong_typing_majors=frozenset(),
    gpu_to_build=common_pb2.RUNTIME_TENSORRT_RTX not in BUILDS_FOR_OTHERS,
    # NVIDIA's documentation; Turing (7.5) must be asked for, and the plus stands for later architectures.
    capabilities=("8.0", "8.6", "8.9", "12.0+"),
    takes_capabilities=common_pb2.RUNTIME_TENSORRT_RTX in BUILDS_FOR_OTHERS,
    optimization_levels=False,
    timing_cache=False,
    inspector=False,
    harmless_warnings=(_LAZY_LOADING, _UNKNOWN_MEMORY),
)
ENGINE_RUNTIMES = (TENSORRT, TENSORRT_RTX)
"""In the order in which the contract prefers them."""
TARGET_ELSEWHERE = "TARGET_ELSEWHERE"
"""Reason of refusals where another machine could build."""


def choose(target: common_pb2.EngineTarget) -> EngineRuntime:
    """Return the runtime that builds for a target.

    Without a runtime in the target, it is the first installed one that can build on this machine.

    Raises:
        FailedPreconditionError: The target is another platform, GPU or version than this machine's, the runtime is not
            installed (the message names the package), or it needs a GPU.
        InvalidArgumentError: The runtime loads no engines.
    """
    wanted = [r for r in ENGINE_RUNTIMES if target.runtime in (common_pb2.RUNTIME_UNSPECIFIED, r.runtime)]
    if not wanted:
        raise InvalidArgumentError("an engine's runtime must be TENSORRT or TENSORRT_RTX", field="target.runtime")
    if target.platform not in ("", platform_name()):
        raise FailedPreconditionError(
            f"engines for {target.name or 'this target'} are built on {target.platform}, and this evaluator runs on "
            f"{platform_name()}; build there from model_trt.onnx, with an evaluator that runs on such a device",
            reason=TARGET_ELSEWHERE,
            field="target.platform",
        )
    installed = [r for r in wanted if r.version() is not None]
    if not installed:
        packages = " or ".join(f"pip install {r.package}" for r in wanted)
        raise FailedPreconditionError(
            f"no runtime that builds this engine is installed on this evaluator: {packages}",
            reason="RUNTIME_NOT_INSTALLED",
            field="target.runtime",
        )
    gpu = find_gpu()
    able = [r for r in installed if gpu is not None or not r.gpu_to_build]
    if not able:
        raise FailedPreconditionError(
            f"{installed[0].module} builds engines only on a machine with an NVIDIA GPU, and this evaluator has none; "
            f"{TENSORRT_RTX.package} builds without one",
            reason="GPU_REQUIRED",
            field="target.runtime",
        )
    right = [r for r in able if is_version(r.version() or "", target.runtime_version)]
    if not right:
        raise FailedPreconditionError(
            f"the engine is wanted from {able[0].module} {target.runtime_version}, and this evaluator has "
            f"{able[0].version()}; engines load only in the version that built them",
            reason=TARGET_ELSEWHERE,
            field="target.runtime_version",
        )
    chosen = right[0]
    if not chosen.takes_capabilities and gpu is not None:
        others = sorted(set(target.compute_capabilities) - {gpu.compute_capability})
        if others:
            raise FailedPreconditionError(
                f"{chosen.module} builds for the GPU at hand, {gpu.name} with compute capability "
                f"{gpu.compute_capability}, not for {', '.join(others)}",
                reason=TARGET_ELSEWHERE,
                field="target.compute_capabilities",
            )
    return chosen


def capabilities() -> evaluator_pb2.GetCapabilitiesResponse:
    """Return what this machine can run and build, without loading any runtime."""
    gpu = find_gpu()
    result = evaluator_pb2.GetCapabilitiesResponse(
        platform=platform_name(),
        cpu=cpu_name(),
        gpu=gpu.name if gpu else "",
        driver_version=driver_version(),
        compute_capability=gpu.compute_capability if gpu else "",
    )
    result.runtimes.add(
        runtime=common_pb2.RUNTIME_ONNXRUNTIME,
        version=importlib.metadata.version("onnxruntime"),
        can_build=False,
        can_run=True,
    )
    for runtime in ENGINE_RUNTIMES:
        version = runtime.version()
        if version is not None:
            result.runtimes.add(
                runtime=runtime.runtime,
                version=version,
                can_build=gpu is not None or not runtime.gpu_to_build,
                can_run=gpu is not None,
            )
    return result
