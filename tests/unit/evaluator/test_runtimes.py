import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from granq.v1 import common_pb2
from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.evaluator import hardware, runtimes
from services.evaluator.hardware import Gpu

TRT, RTX = common_pb2.RUNTIME_TENSORRT, common_pb2.RUNTIME_TENSORRT_RTX


def machine(monkeypatch: pytest.MonkeyPatch, installed: set[str], gpu: Gpu | None) -> None:
    found = importlib.util.find_spec
    names = {"tensorrt", "tensorrt_rtx"}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (SimpleNamespace() if name in installed else None) if name in names else found(name, *rest),
    )
    monkeypatch.setattr(runtimes, "find_gpu", lambda: gpu)


ADA = Gpu("NVIDIA L4", "8.9")


@pytest.mark.parametrize(
    ("installed", "gpu", "wanted", "chosen"),
    [
        ({"tensorrt", "tensorrt_rtx"}, ADA, 0, TRT),
        ({"tensorrt", "tensorrt_rtx"}, None, 0, RTX),
        ({"tensorrt_rtx"}, ADA, 0, RTX),
        ({"tensorrt", "tensorrt_rtx"}, ADA, RTX, RTX),
        ({"tensorrt"}, ADA, TRT, TRT),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], gpu: Gpu | None, wanted: Any, chosen: Any
) -> None:
    machine(monkeypatch, installed, gpu)
    assert runtimes.choose(common_pb2.EngineTarget(runtime=wanted)).runtime == chosen


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (0, "pip install tensorrt or pip install tensorrt-rtx"),
        (TRT, "pip install tensorrt$"),
        (RTX, "pip install tensorrt-rtx$"),
    ],
)
def test_missing_runtime_names_the_package(monkeypatch: pytest.MonkeyPatch, wanted: Any, message: str) -> None:
    machine(monkeypatch, set(), ADA)
    with pytest.raises(FailedPreconditionError, match=message) as caught:
        runtimes.choose(common_pb2.EngineTarget(runtime=wanted))
    assert caught.value.reason == "RUNTIME_NOT_INSTALLED"


def test_tensorrt_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"tensorrt"}, None)
    with pytest.raises(FailedPreconditionError, match="NVIDIA GPU") as caught:
        runtimes.choose(common_pb2.EngineTarget())
    assert caught.value.reason == "GPU_REQUIRED"


def test_tensorrt_builds_for_its_own_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"tensorrt"}, ADA)
    runtimes.choose(common_pb2.EngineTarget(compute_capabilities=["8.9"]))
    with pytest.raises(FailedPreconditionError, match=r"L4 .*8\.9, not for 12\.0, 8\.6") as caught:
        runtimes.choose(common_pb2.EngineTarget(compute_capabilities=["12.0", "8.9", "8.6"]))
    assert caught.value.field == "target.compute_capabilities"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"platform": "linux-riscv64", "name": "board"}, "board are built on linux-riscv64"),
        ({"runtime": TRT, "runtime_version": "10.3"}, r"tensorrt 10\.3, and this evaluator has 10\.13\.2"),
        ({"runtime": TRT, "runtime_version": "10.13.20"}, r"this evaluator has 10\.13\.2"),
    ],
)
def test_a_target_of_another_machine_is_refused(
    monkeypatch: pytest.MonkeyPatch, target: dict[str, Any], message: str
) -> None:
    machine(monkeypatch, {"tensorrt", "tensorrt_rtx"}, ADA)
    monkeypatch.setattr(runtimes.EngineRuntime, "version", lambda runtime: "10.13.2")
    with pytest.raises(FailedPreconditionError, match=message) as caught:
        runtimes.choose(common_pb2.EngineTarget(**target))
    assert caught.value.reason == "TARGET_ELSEWHERE"


@pytest.mark.parametrize("version", ["", "10", "10.13", "10.13.2"])
def test_a_target_of_this_machine_is_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    machine(monkeypatch, {"tensorrt"}, ADA)
    monkeypatch.setattr(runtimes.EngineRuntime, "version", lambda runtime: "10.13.2")
    target = common_pb2.EngineTarget(runtime_version=version, platform=hardware.platform_name())
    assert runtimes.choose(target).runtime == TRT


def test_onnxruntime_builds_no_engines() -> None:
    with pytest.raises(InvalidArgumentError):
        runtimes.choose(common_pb2.EngineTarget(runtime=common_pb2.RUNTIME_ONNXRUNTIME))


def test_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"tensorrt", "tensorrt_rtx"}, None)
    answer = runtimes.capabilities()
    flags = {r.runtime: (r.can_build, r.can_run) for r in answer.runtimes}
    assert flags == {common_pb2.RUNTIME_ONNXRUNTIME: (False, True), TRT: (False, False), RTX: (True, False)}
    assert all(r.version for r in answer.runtimes)
    assert answer.platform == hardware.platform_name()
    assert answer.cpu
    assert answer.gpu == ""
    machine(monkeypatch, {"tensorrt"}, ADA)
    answer = runtimes.capabilities()
    assert answer.gpu == "NVIDIA L4"
    assert [(r.can_build, r.can_run) for r in answer.runtimes if r.runtime == TRT] == [(True, True)]


# --- what the drivers tell


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    cached = (hardware.cpu_name, hardware.find_gpu, hardware.driver_version)
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

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 6}[attribute]
        return 0


@pytest.mark.parametrize(
    ("library", "gpu"),
    [(FakeCuda(), Gpu("NVIDIA Test", "8.6")), (FakeCuda(devices=0), None), (FakeCuda(status=100), None), (None, None)],
)
def test_gpu(monkeypatch: pytest.MonkeyPatch, library: FakeCuda | None, gpu: Gpu | None) -> None:
    monkeypatch.setattr(hardware, "_library", lambda name: library if name == "libcuda.so.1" else None)
    assert hardware.find_gpu() == gpu


def test_driver_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "_library", lambda name: None)
    info = tmp_path / "version"
    monkeypatch.setattr(hardware, "_DRIVER_INFO", info)
    assert hardware.driver_version() == ""
    hardware.driver_version.cache_clear()
    info.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version:\n")
    assert hardware.driver_version() == "580.95.05"


def test_cpu_name_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "_CPU_INFO", tmp_path / "none")
    assert hardware.cpu_name()
