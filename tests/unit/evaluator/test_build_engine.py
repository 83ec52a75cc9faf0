import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from granq.v1 import common_pb2, evaluator_pb2, reports_pb2
from services.common.errors import (
    CancelledError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from services.evaluator import engine_build, runtimes
from services.evaluator.build_spec import BuildSpec
from services.evaluator.graph import load_graph
from services.evaluator.jobs import build_engine
from services.evaluator.plan_audit import audit_plan
from services.quantizer.calibrate import calibrate
from services.quantizer.config import Quantization
from services.quantizer.integer import to_integer
from services.quantizer.onnx_export import export_trt
from services.quantizer.student import build_student
from tests.support import networks
from tests.support.evaluator_bench import EvaluatorBench
from tests.support.models import captured
from tests.support.onnx_graphs import convolutions, quantized, saved
from tests.support.waiting import eventually, is_gone

RTX = common_pb2.RUNTIME_TENSORRT_RTX
needs_rtx = pytest.mark.skipif(
    runtimes.TENSORRT_RTX.version() is None, reason="tensorrt-rtx is not installed: pip install tensorrt-rtx"
)


@pytest.fixture
def bench(tmp_path: Path) -> EvaluatorBench:
    return EvaluatorBench(tmp_path)


def built(bench: EvaluatorBench, model: onnx.ModelProto, **target: Any) -> reports_pb2.EngineBuildResult:
    target.setdefault("runtime", RTX)
    request = evaluator_pb2.StartBuildEngineRequest(onnx_trt=bench.put(model), target=common_pb2.EngineTarget(**target))
    return build_engine(request, bench.context).engine


@needs_rtx
def test_builds_an_int8_engine_with_its_manifest(bench: EvaluatorBench) -> None:
    model = quantized()
    result = built(bench, model)
    assert (result.int8_layers, result.total_layers) == (3, 3)
    assert result.seconds > 0
    manifest = result.manifest
    assert manifest.engine.size_bytes == len(bench.store.read_bytes(manifest.engine.digest)) > 10_000
    assert manifest.onnx_digest == bench.put(model).digest
    assert manifest.runtime == RTX
    assert manifest.runtime_version == runtimes.TENSORRT_RTX.version()
    assert list(manifest.compute_capabilities) == ["8.0", "8.6", "8.9", "12.0+"]
    assert (manifest.batch.min, manifest.batch.opt, manifest.batch.max) == (1, 8, 64)
    assert [(t.name, t.input, t.data_type, list(t.shape)) for t in manifest.tensors] == [
        ("images", True, "FLOAT", [-1, 3, 8, 8]),
        ("logits", False, "FLOAT", [-1, 5]),
    ]
    record = json.loads(bench.store.read_bytes(result.manifest_file.digest))
    assert record["runtime"] == "RUNTIME_TENSORRT_RTX"
    assert record["engine"]["digest"] == manifest.engine.digest
    assert record["tensors"][0]["shape"] == ["-1", "3", "8", "8"]
    assert [p.phase for p in bench.reports][:2] == ["checking", "building"]
    assert any(p.phase.startswith("building: ") and p.total for p in bench.reports)


@needs_rtx
def test_values_that_are_padded_before_they_are_rounded_leave_layers_in_int8(bench: EvaluatorBench) -> None:
    student = build_student(captured(networks.NETWORKS["NarrowStem"](), networks.SHAPE), Quantization(8, 8))
    calibrate(student, torch.randn(8, *networks.SHAPE, generator=torch.Generator().manual_seed(0)))
    model = export_trt(to_integer(student), networks.SHAPE)
    assert [node.op_type for node in model.graph.node].count("Pad") == 2
    result = built(bench, model)
    assert (result.int8_layers, result.total_layers) == (6, 6)


@needs_rtx
def test_target_is_followed(bench: EvaluatorBench) -> None:
    result = built(
        bench,
        quantized(),
        compute_capabilities=["8.9"],
        batch=common_pb2.BatchProfile(min=4, opt=4, max=4),
        workspace_bytes=1 << 26,
        optimization_level=1,
    )
    assert list(result.manifest.compute_capabilities) == ["8.9"]
    assert (result.manifest.batch.min, result.manifest.batch.max) == (4, 4)
    assert (result.int8_layers, result.total_layers) == (3, 3)


@needs_rtx
def test_unknown_capability_is_refused(bench: EvaluatorBench) -> None:
    with pytest.raises(FailedPreconditionError, match=r"builds for .*8\.9.*not for 3\.5") as caught:
        built(bench, quantized(), compute_capabilities=["8.9", "3.5"])
    assert caught.value.field == "target.compute_capabilities"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"channel_scales": True}, ["conv1_sums", "conv2_sums"]),
        ({"float_weights": ("conv2",)}, ["conv2_sums"]),
    ],
)
@needs_rtx
def test_float_convolutions_fail_before_and_after_the_build(
    bench: EvaluatorBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], names: list[str]
) -> None:
    with pytest.raises(FailedPreconditionError, match=r"the graph stores .* give their inputs one scale") as caught:
        built(bench, quantized(**options))
    assert caught.value.reason == "LAYER_NOT_INT8"
    # The plan says so by itself, too.
    monkeypatch.setattr(engine_build, "check_graph", lambda graph: None)
    with pytest.raises(FailedPreconditionError, match="tensorrt_rtx built") as caught:
        built(bench, quantized(**options))
    assert all(name in str(caught.value) for name in names)
    assert str(caught.value).count("_sums") == len(names)


@needs_rtx
def test_a_sound_graph_that_a_gpu_family_runs_in_float_fails_its_build(bench: EvaluatorBench) -> None:
    # For Turing the runtime builds convolutions, but expands their INT8 weights into floats first.
    model = convolutions()
    assert built(bench, model, compute_capabilities=["8.9"]).int8_layers == 2
    for capabilities in (["7.5"], ["8.9", "7.5"]):
        with pytest.raises(FailedPreconditionError, match=r"tensorrt_rtx built .* other compute capab") as caught:
            built(bench, model, compute_capabilities=capabilities)
        assert caught.value.reason == "LAYER_NOT_INT8"
        for name in ("conv1_sums", "head_sums"):
            assert f"{name} (the plan expands its INT8 weight into floating point)" in caught.value.message


@needs_rtx
def test_float_linear_layers_are_counted_and_named(bench: EvaluatorBench) -> None:
    result = built(bench, quantized(float_weights=("logits",)))
    assert (result.int8_layers, result.total_layers) == (2, 3)
    (found,) = result.float_layers
    assert (found.name, found.kind, found.reason) == ("logits_sums", "Gemm", "its weight is stored in floating point")


@needs_rtx
def test_warnings_fail_the_build(bench: EvaluatorBench) -> None:
    # Unsigned codes build, but the runtime takes them as signed ones, and only warns.
    with pytest.raises(FailedPreconditionError, match="UINT8") as caught:
        built(bench, quantized(unsigned=True))
    assert caught.value.reason == "ENGINE_BUILD_WARNING"


@needs_rtx
def test_graph_that_cannot_be_parsed(bench: EvaluatorBench) -> None:
    model = quantized()
    next(n for n in model.graph.node if n.op_type == "GlobalAveragePool").op_type = "NoSuchOperation"
    with pytest.raises(InvalidArgumentError, match=r"cannot parse.*NoSuchOperation") as caught:
        built(bench, model)
    assert caught.value.field == "onnx_trt"


@needs_rtx
def test_failed_build_carries_the_runtimes_words(bench: EvaluatorBench) -> None:
    # Four-bit weights parse, and no kernel for them exists.
    model = quantized()
    for tensor in model.graph.initializer:
        if tensor.name == "conv2_codes":
            tensor.data_type = onnx.TensorProto.INT4
            tensor.raw_data = bytes(len(tensor.raw_data) // 2)
    with pytest.raises((FailedPreconditionError, InvalidArgumentError)) as caught:
        built(bench, model)
    assert len(str(caught.value)) > 40


def spec_of(tmp_path: Path, **changes: Any) -> BuildSpec:
    fields: dict[str, Any] = {
        "module": "tensorrt_rtx",
        "strong_typing_majors": [],
        "onnx": str(saved(tmp_path, "m", quantized())),
        "plan": str(tmp_path / "plan"),
        "batch": [1, 2, 4],
        "capabilities": [],
        "workspace_bytes": None,
        "optimization_level": None,
    }
    return BuildSpec(**(fields | changes))


def fake_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put a module named fake_runtime on the build process's path."""
    (folder / "fake_runtime.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))


def test_killed_build_is_told_from_a_failed_one(
    bench: EvaluatorBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_runtime(tmp_path, monkeypatch, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(UnavailableError, match="SIGKILL") as caught:
        engine_build.run_build(spec_of(tmp_path, module="fake_runtime"), bench.context, 60)
    assert caught.value.reason == "ENGINE_BUILD_PROCESS_DIED"


def test_defect_in_a_build_is_not_retryable(
    bench: EvaluatorBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_runtime(tmp_path, monkeypatch, "raise KeyError('defect')\n")
    with pytest.raises(InternalError, match="exit code 1"):
        engine_build.run_build(spec_of(tmp_path, module="fake_runtime"), bench.context, 60)


def test_runtime_that_cannot_be_loaded(bench: EvaluatorBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runtime(tmp_path, monkeypatch, "raise ImportError('libnvinfer.so.11: no such file')\n")
    with pytest.raises(FailedPreconditionError, match=r"libnvinfer\.so\.11"):
        engine_build.run_build(spec_of(tmp_path, module="fake_runtime"), bench.context, 60)


def test_build_ends_with_its_job(bench: EvaluatorBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runtime(tmp_path, monkeypatch, "import signal\nsignal.pause()\n")
    spec = spec_of(tmp_path, module="fake_runtime")
    with pytest.raises(ResourceExhaustedError, match="longer"):
        engine_build.run_build(spec, bench.context, 0.3)
    bench.cancel()
    with pytest.raises(CancelledError):
        engine_build.run_build(spec, bench.context, 60)


JOB = """
import sys
from pathlib import Path
from services.evaluator.build_spec import BuildSpec
from services.evaluator.engine_build import run_build
from tests.support.evaluator_bench import EvaluatorBench

folder = Path(sys.argv[1])
spec = BuildSpec("fake_runtime", [], str(folder / "m"), str(folder / "plan"), [1, 2, 4], [], None, None)
run_build(spec, EvaluatorBench(folder).context, 60)
"""


def test_a_full_disk_is_told_from_a_defect(
    bench: EvaluatorBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    support = Path(__file__).parents[2] / "support" / "fake_tensorrt.py"
    code = f"{support.read_text()}\nimport sys\nsys.modules[__name__] = FakeTensorRT('11.4.0')\n"
    fake_runtime(tmp_path, monkeypatch, code)
    spec = spec_of(tmp_path, module="fake_runtime", plan="/dev/full")
    with pytest.raises(ResourceExhaustedError, match="the disk with /dev is full; free space") as caught:
        engine_build.run_build(spec, bench.context, 60)
    assert caught.value.reason == "DISK_FULL"
    assert any(p.phase == "building: Building Engine" for p in bench.reports)


async def test_build_dies_with_a_killed_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "pid"
    fake_runtime(
        tmp_path,
        monkeypatch,
        f"import os, signal\nopen({str(told)!r}, 'w').write(str(os.getpid()) + ' ')\nsignal.pause()\n",
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[3])])}
    job = subprocess.Popen([sys.executable, "-c", JOB, str(tmp_path)], env=environment)
    try:
        await eventually(lambda: told.exists() and told.read_text().endswith(" "))
        build = int(told.read_text())
        assert not is_gone(build)
    finally:
        job.kill()
        job.wait()
    await eventually(lambda: is_gone(build))


def test_unreadable_plan_has_no_audit(tmp_path: Path) -> None:
    graph = load_graph(saved(tmp_path, "m", quantized()), "f")
    assert audit_plan(b"\0a plan of another version\0", graph.layers, None) is None


def test_warnings_about_speed_are_harmless() -> None:
    harmless = "CUDA lazy loading is not enabled. Enabling it can significantly reduce device memory usage."
    borne = engine_build.check_warnings(runtimes.TENSORRT, [harmless, harmless])
    assert list(borne) == [harmless]
    assert "memory" in borne[harmless]
    with pytest.raises(FailedPreconditionError, match="Missing scale"):
        engine_build.check_warnings(runtimes.TENSORRT, [harmless, "Missing scale and zero-point for tensor x"])
