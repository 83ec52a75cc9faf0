import importlib.util
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from granq.engines.fit import build_misfits
from granq.engines.machine import Gpu, Machine, platform_name
from granq.v1 import common_pb2
from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.evaluator import runtimes

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
VERSIONS = {"tensorrt": "10.13.2", "tensorrt_rtx": "1.7.1"}


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
    target = common_pb2.EngineTarget(runtime_version=version, platform=platform_name())
    assert runtimes.choose(target).runtime == TRT


@pytest.mark.parametrize("gpu", [ADA, Gpu("Orin", "8.7"), None])
@pytest.mark.parametrize("installed", [(), ("tensorrt",), ("tensorrt_rtx",), ("tensorrt", "tensorrt_rtx")])
def test_whoever_looks_at_a_machine_from_afar_decides_as_it_does_itself(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], gpu: Gpu | None
) -> None:
    """The coordinator chooses devices by build_misfits; what it gives a device, the device must not refuse."""
    machine(monkeypatch, set(installed), gpu)
    versions = {name: version for name, version in VERSIONS.items() if name in installed}
    monkeypatch.setattr(runtimes.EngineRuntime, "version", lambda runtime: versions.get(runtime.module))
    there: dict[int, str] = {r.runtime: versions[r.module] for r in runtimes.ENGINE_RUNTIMES if r.module in versions}
    seen = Machine(platform_name(), gpu, "", there)
    decided = set()
    for runtime, version, platform, capabilities in itertools.product(
        (0, TRT, RTX), ("", "10", "10.13.2", "1.7", "8"), ("", platform_name(), "linux-riscv64"), ([], ["8.9"], ["8.7"])
    ):
        target = common_pb2.EngineTarget(
            runtime=runtime,  # type: ignore[arg-type]
            runtime_version=version,
            platform=platform,
            compute_capabilities=capabilities,
        )
        try:
            runtimes.choose(target)
        except FailedPreconditionError:
            builds = False
        else:
            builds = True
        assert (build_misfits(target, seen) == []) == builds, target
        decided.add(builds)
    able = "tensorrt_rtx" in installed or ("tensorrt" in installed and gpu is not None)
    assert decided == ({True, False} if able else {False})


def test_onnxruntime_builds_no_engines() -> None:
    with pytest.raises(InvalidArgumentError):
        runtimes.choose(common_pb2.EngineTarget(runtime=common_pb2.RUNTIME_ONNXRUNTIME))


def test_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"tensorrt", "tensorrt_rtx"}, None)
    answer = runtimes.capabilities()
    flags = {r.runtime: (r.can_build, r.can_run) for r in answer.runtimes}
    assert flags == {common_pb2.RUNTIME_ONNXRUNTIME: (False, True), TRT: (False, False), RTX: (True, False)}
    assert all(r.version for r in answer.runtimes)
    assert answer.platform == platform_name()
    assert answer.cpu
    assert answer.gpu == ""
    machine(monkeypatch, {"tensorrt"}, ADA)
    answer = runtimes.capabilities()
    assert answer.gpu == "NVIDIA L4"
    assert [(r.can_build, r.can_run) for r in answer.runtimes if r.runtime == TRT] == [(True, True)]
