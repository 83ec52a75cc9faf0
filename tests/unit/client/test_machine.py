"""What the drivers and the packages tell of a machine."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from granq.engines import machine
from granq.engines.machine import Gpu


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    cached = (machine.cpu_name, machine.find_gpu, machine.driver_version)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


class FakeCuda:
    """The CUDA driver of a machine with one GPU."""

    def __init__(self, devices: int = 1, status: int = 0) -> None:
        self._devices, self._status = devices, status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self._devices
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = 7
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:  # noqa: N802
        name.value = b"NVIDIA Test"
        return 0 if device.value == 7 and len(name) == size else 101

    def cuDeviceTotalMem_v2(self, size: Any, device: ctypes.c_int) -> int:  # noqa: N802
        size._obj.value = 8 * 1024**3
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 6}[attribute]
        return 0


@pytest.mark.parametrize(
    ("library", "gpu"),
    [
        (FakeCuda(), Gpu("NVIDIA Test", "8.6", 8 * 1024**3)),
        (FakeCuda(devices=0), None),
        (FakeCuda(status=100), None),
        (None, None),
    ],
)
def test_gpu(monkeypatch: pytest.MonkeyPatch, library: FakeCuda | None, gpu: Gpu | None) -> None:
    monkeypatch.setattr(machine, "_library", lambda name: library if name == "libcuda.so.1" else None)
    assert machine.find_gpu() == gpu


def test_driver_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_library", lambda name: None)
    info = tmp_path / "version"
    monkeypatch.setattr(machine, "_DRIVER_INFO", info)
    assert machine.driver_version() == ""
    machine.driver_version.cache_clear()
    info.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version:\n")
    assert machine.driver_version() == "580.95.05"


def test_cpu_name_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "none")
    assert machine.cpu_name()


def test_a_runtime_is_found_without_its_import() -> None:
    assert machine.installed_version("no_such_runtime", "no-such-runtime") is None
    assert machine.installed_version("json", "no-such-runtime") == machine.UNKNOWN_VERSION
    assert machine.installed_version("pytest", "pytest") == pytest.__version__


def test_this_machine() -> None:
    found = machine.this_machine()
    assert found.platform == machine.platform_name()
    assert found.gpu == machine.find_gpu()
    assert set(found.runtimes) <= set(machine.RUNTIME_PACKAGES)
