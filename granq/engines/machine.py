"""What this machine is: processor, GPU and driver, asked of the drivers themselves, so no package is needed."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from granq.v1 import common_pb2

UNKNOWN_VERSION = "unknown"
RUNTIME_PACKAGES: Mapping[int, tuple[str, str]] = {
    common_pb2.RUNTIME_TENSORRT: ("tensorrt", "tensorrt"),
    common_pb2.RUNTIME_TENSORRT_RTX: ("tensorrt_rtx", "tensorrt-rtx"),
}
"""Python module, and what pip installs, of each runtime that loads engines."""
_CPU_INFO = Path("/proc/cpuinfo")
_DRIVER_INFO = Path("/proc/driver/nvidia/version")
_NAME_BYTES = 256
# CUdevice_attribute numbers of the CUDA driver API.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """The GPU that CUDA lists first, which is where engines are built and run.

    Attributes:
        name: Product name.
        compute_capability: Such as "8.6".
        memory_bytes: Its memory; 0 where the driver does not tell.
    """

    name: str
    compute_capability: str
    memory_bytes: int = 0


@dataclass(frozen=True)
class Machine:
    """What decides whether an engine runs.

    Attributes:
        platform: As :func:`platform_name`.
        gpu: As :func:`find_gpu`.
        driver: As :func:`driver_version`.
        runtimes: Version of each installed runtime that loads engines, by its number in granq.v1.Runtime.
    """

    platform: str
    gpu: Gpu | None
    driver: str
    runtimes: Mapping[int, str] = field(default_factory=dict)


def this_machine() -> Machine:
    """Return the machine that this runs on."""
    versions = {runtime: installed_version(*names) for runtime, names in RUNTIME_PACKAGES.items()}
    runtimes = {runtime: version for runtime, version in versions.items() if version is not None}
    return Machine(platform_name(), find_gpu(), driver_version(), runtimes)


def installed_version(module: str, package: str) -> str | None:
    """Return the installed version of a runtime, or None without it.

    The runtime is not imported, which would load its libraries. "unknown" is returned where no package tells: JetPack
    and NVIDIA's containers may bring the module under other names.
    """
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN_VERSION


def platform_name() -> str:
    """Return operating system and architecture, such as "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine().lower()}"


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """Return the processor's model name, or the architecture where the system does not tell."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@lru_cache(maxsize=1)
def find_gpu() -> Gpu | None:
    """Return the GPU, or None without a usable one."""
    cuda = _library("libcuda.so.1")
    device, count = ctypes.c_int(), ctypes.c_int()
    if cuda is None or cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    name = ctypes.create_string_buffer(_NAME_BYTES)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, _NAME_BYTES, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    )
    if failed:
        return None
    memory = ctypes.c_size_t()
    told = cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device) == 0
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", memory.value if told else 0)


@lru_cache(maxsize=1)
def driver_version() -> str:
    """Return the NVIDIA driver's version, such as "580.95.05"; empty without one."""
    nvml = _library("libnvidia-ml.so.1")
    if nvml is not None and nvml.nvmlInit_v2() == 0:
        text = ctypes.create_string_buffer(_NAME_BYTES)
        found = nvml.nvmlSystemGetDriverVersion(text, _NAME_BYTES) == 0
        nvml.nvmlShutdown()
        if found:
            return text.value.decode(errors="replace")
    try:
        # The driver library is missing in some containers, and its kernel module still tells.
        match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", _DRIVER_INFO.read_text(errors="replace"))
    except OSError:
        return ""
    return match.group(1) if match else ""


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None
