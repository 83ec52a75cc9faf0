"""Whether an engine runs on a machine, or can be built there.

Engines are bound to runtime, version, platform, GPU and driver.
"""

from collections.abc import Mapping

from granq.engines.machine import UNKNOWN_VERSION, Machine
from granq.v1 import common_pb2, reports_pb2

NAMES: Mapping[int, str] = {
    common_pb2.RUNTIME_ONNXRUNTIME: "ONNX Runtime",
    common_pb2.RUNTIME_TENSORRT: "TensorRT",
    common_pb2.RUNTIME_TENSORRT_RTX: "TensorRT-RTX",
}
BUILDERS = (common_pb2.RUNTIME_TENSORRT, common_pb2.RUNTIME_TENSORRT_RTX)
"""Runtimes that build engines, in the order in which the contract prefers them."""
BUILDS_FOR_OTHERS = frozenset({common_pb2.RUNTIME_TENSORRT_RTX})
"""Those of them that build without a GPU, for any; the others time their kernels on the GPU that they build for."""


def misfits(manifest: reports_pb2.EngineManifest, machine: Machine) -> list[str]:
    """Return why an engine does not run on a machine, one sentence for each reason; nothing where it does.

    What the manifest leaves open is not checked. A newer driver runs what was built under an older one, not the other
    way round; only the driver's branch (580 of 580.95.05) counts, since its releases do not differ in what they run.
    """
    return [
        reason
        for reason in (
            _platform(manifest, machine),
            _runtime(manifest, machine),
            _gpu(manifest, machine),
            _driver(manifest, machine),
        )
        if reason
    ]


def build_misfits(target: common_pb2.EngineTarget, machine: Machine) -> list[str]:
    """Return why an engine for a target cannot be built on a machine, one sentence for each reason; none where it can.

    Where the target names no runtime, the first that can build on the machine counts.
    """
    wanted = [r for r in BUILDERS if target.runtime in (common_pb2.RUNTIME_UNSPECIFIED, r)]
    if not wanted:
        return [f"{NAMES.get(target.runtime, 'an unknown runtime')} builds no engines"]
    lacks = {runtime: _lacks(runtime, target, machine) for runtime in wanted}
    runtime = next((runtime for runtime in wanted if not lacks[runtime]), wanted[0])
    elsewhere = (
        [f"it is {machine.platform}, not {target.platform}"] if target.platform not in ("", machine.platform) else []
    )
    return elsewhere + lacks[runtime] + _other_gpus(runtime, target, machine)


def _lacks(runtime: int, target: common_pb2.EngineTarget, machine: Machine) -> list[str]:
    lacks: list[str] = []
    installed = machine.runtimes.get(runtime)
    if installed is None:
        lacks.append(f"{NAMES[runtime]} is not installed")
    elif not is_version(installed, target.runtime_version):
        lacks.append(f"it has {NAMES[runtime]} {installed}, not {target.runtime_version}")
    if machine.gpu is None and runtime not in BUILDS_FOR_OTHERS:
        lacks.append(f"{NAMES[runtime]} builds on a machine with an NVIDIA GPU, and it has none")
    return lacks


def _other_gpus(runtime: int, target: common_pb2.EngineTarget, machine: Machine) -> list[str]:
    if machine.gpu is None or runtime in BUILDS_FOR_OTHERS:
        return []
    have = machine.gpu.compute_capability
    others = sorted(set(target.compute_capabilities) - {have})
    return [f"its {machine.gpu.name} has compute capability {have}, not {', '.join(others)}"] if others else []


def is_version(version: str, wanted: str) -> bool:
    """Return whether a version is the wanted one, or a release of it; a version that is not known is taken."""
    return version == UNKNOWN_VERSION or f"{version}.".startswith(f"{wanted}." if wanted else "")


def _platform(manifest: reports_pb2.EngineManifest, machine: Machine) -> str:
    if manifest.platform in ("", machine.platform):
        return ""
    return f"it was built for {manifest.platform}, and this machine is {machine.platform}"


def _runtime(manifest: reports_pb2.EngineManifest, machine: Machine) -> str:
    name = NAMES.get(manifest.runtime, "an unknown runtime")
    if manifest.runtime not in machine.runtimes:
        return f"it needs {name} {manifest.runtime_version}, which is not installed here"
    installed = machine.runtimes[manifest.runtime]
    if UNKNOWN_VERSION in (installed, manifest.runtime_version) or installed == manifest.runtime_version:
        return ""
    return f"it needs {name} {manifest.runtime_version} exactly, and {installed} is installed here"


def _gpu(manifest: reports_pb2.EngineManifest, machine: Machine) -> str:
    wanted = list(manifest.compute_capabilities)
    if machine.gpu is None:
        of_these = f" of compute capability {' or '.join(wanted)}" if wanted else ""
        return f"it needs an NVIDIA GPU{of_these} with its driver, and none is found here"
    have = machine.gpu.compute_capability
    if not wanted or any(_covers(capability, have) for capability in wanted):
        return ""
    return f"it was built for compute capability {' or '.join(wanted)}, and the {machine.gpu.name} here has {have}"


def _driver(manifest: reports_pb2.EngineManifest, machine: Machine) -> str:
    if machine.gpu is None or not manifest.driver_version or not machine.driver:
        return ""
    if _numbers(machine.driver)[:1] >= _numbers(manifest.driver_version)[:1]:
        return ""
    return f"it was built under driver {manifest.driver_version}, and the driver here is older: {machine.driver}"


def _covers(capability: str, have: str) -> bool:
    """Return whether "8.6", or "12.0+" for it and all later ones, admits a GPU."""
    if capability.endswith("+"):
        return _numbers(have) >= _numbers(capability[:-1])
    return capability == have


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
