"""Builds with NVIDIA's TensorRT, for which a stand-in answers: the way is the same, what differs is held here."""

from pathlib import Path
from typing import Any

import onnx
import pytest

from granq.engines.machine import Gpu
from granq.v1 import artifacts_pb2, common_pb2, evaluator_pb2, reports_pb2
from services.common.errors import FailedPreconditionError
from services.evaluator import manifest, runtimes, timing_cache
from services.evaluator.jobs import build_engine
from tests.support.evaluator_bench import EvaluatorBench
from tests.support.onnx_graphs import quantized


def kernel(node: str, weights: str = "Int8", kind: str = "CaskConvolution") -> dict[str, Any]:
    """Return what the inspector says of the kernel of a layer."""
    return {
        "Name": f"{node}_codes + {node}_weight + {node}_sums",
        "LayerType": kind,
        "Inputs": [{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
        "Weights": {"Type": weights, "Count": 432},
        "TacticName": "",
        "Metadata": f"[ONNX Layer: {node}_weight]\x1e[ONNX Layer: {node}_sums]",
    }


def gemm(node: str, datatype: str) -> dict[str, Any]:
    return {
        "Name": "__myl_Fc_myl0_1",
        "LayerType": "gemm",
        "Inputs": [{"Name": "x", "Format/Datatype": datatype}],
        "Metadata": f"[ONNX Layer: {node}_sums]",
    }


@pytest.fixture
def bench(tmp_path: Path) -> EvaluatorBench:
    return EvaluatorBench(tmp_path)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.EngineRuntime, "version", lambda runtime: "10.3.0")
    for module in (runtimes, timing_cache, manifest):
        monkeypatch.setattr(module, "find_gpu", lambda: Gpu("NVIDIA L4", "8.9"))
    for module in (timing_cache, manifest):
        monkeypatch.setattr(module, "driver_version", lambda: "580.95.05")


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, *kernels: dict[str, Any], fail: str = "") -> None:
    """Put a TensorRT 10.3 whose engines have these kernels where build processes find it."""
    code = (Path(__file__).parents[2] / "support" / "fake_tensorrt.py").read_text()
    made = f"FakeTensorRT('10.3.0', {fail!r}, {list(kernels)!r})"
    (folder / "tensorrt.py").write_text(f"{code}\nimport sys\nsys.modules[__name__] = {made}\n")
    monkeypatch.syspath_prepend(str(folder))


def built(bench: EvaluatorBench, model: onnx.ModelProto, **target: Any) -> reports_pb2.EngineBuildResult:
    wanted = common_pb2.EngineTarget(runtime=common_pb2.RUNTIME_TENSORRT, **target)
    request = evaluator_pb2.StartBuildEngineRequest(onnx_trt=bench.put(model), target=wanted)
    return build_engine(request, bench.context).engine


def test_timing_caches_are_named_by_version_device_and_driver(
    bench: EvaluatorBench, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert timing_cache.cache_name_of(runtimes.TENSORRT) is None
    request.getfixturevalue("on_a_gpu")
    assert timing_cache.cache_name_of(runtimes.TENSORRT_RTX) is None
    name = timing_cache.cache_name_of(runtimes.TENSORRT)
    assert name == "timing-caches/tensorrt/10.3.0/NVIDIA_L4/8.9/580.95.05"
    # One that the store lost is as none.
    bench.store.set_ref(name, artifacts_pb2.Artifact(digest=f"sha256:{'0' * 64}").SerializeToString())
    assert not timing_cache.fetch_cache(bench.store, name, tmp_path / "timing.cache")


@pytest.mark.usefixtures("on_a_gpu")
def test_it_goes_the_same_way_and_keeps_its_timings(
    bench: EvaluatorBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, monkeypatch, kernel("conv1"), kernel("conv2"), gemm("logits", "Row major linear FP32"))
    for timings in (b"+timed", b"+timed+timed"):
        result = built(bench, quantized(), optimization_level=5)
        (name,) = bench.store.list_refs("timing-caches/")
        kept = artifacts_pb2.Artifact.FromString(bench.store.get_ref(name) or b"")
        assert bench.store.read_bytes(kept.digest) == timings
    record = result.manifest
    assert bench.store.read_bytes(record.engine.digest) == b"plan"
    assert (record.runtime_version, list(record.compute_capabilities)) == ("10.3.0", ["8.9"])
    assert (record.driver_version, result.int8_layers, result.total_layers) == ("580.95.05", 2, 3)
    ((name, kind, reason),) = [(found.name, found.kind, found.reason) for found in result.float_layers]
    assert (name, kind, reason) == ("logits_sums", "Gemm", "the builder chose gemm")


@pytest.mark.usefixtures("on_a_gpu")
def test_a_convolution_that_came_out_in_float_fails_the_build(
    bench: EvaluatorBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, monkeypatch, kernel("conv1"), kernel("conv2", "Half"), gemm("logits", "Int8"))
    with pytest.raises(FailedPreconditionError, match="tensorrt built convolutions in floating point") as caught:
        built(bench, quantized())
    assert caught.value.reason == "LAYER_NOT_INT8"
    assert "conv2_sums (the builder chose CaskConvolution with Half weights)" in caught.value.message
    assert "conv1" not in caught.value.message
    assert not bench.store.list_refs("timing-caches/")


@pytest.mark.usefixtures("on_a_gpu")
def test_an_engine_that_tells_nothing_is_not_called_int8(
    bench: EvaluatorBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, monkeypatch)
    result = built(bench, quantized())
    assert not result.HasField("int8_layers")
    assert result.total_layers == 3


@pytest.mark.usefixtures("on_a_gpu")
def test_an_engine_that_cannot_be_loaded_where_it_was_built_is_no_engine(
    bench: EvaluatorBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, monkeypatch, fail="load")
    with pytest.raises(FailedPreconditionError, match="cannot start here"):
        built(bench, quantized())
