"""Engines on a stand-in GPU, and the refusals of this machine, which has none."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from granq.engines.machine import Gpu, Machine, find_gpu
from granq.v1 import artifacts_pb2, common_pb2, evaluator_pb2, reports_pb2
from services.common.errors import (
    FailedPreconditionError,
    GranqError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from services.evaluator import engine_model, evaluation
from services.evaluator.cuda import LIBRARY, Cuda
from services.evaluator.engine_figures import measure_batches
from services.evaluator.engine_model import EngineModel, require_fit
from services.evaluator.evaluation import evaluate_graphs
from services.evaluator.graph import load_graph
from services.evaluator.onnx_runtime import OnnxModel
from tests.support.evaluator_bench import EvaluatorBench
from tests.support.fake_engine import FakeGpu, FakeRuntime, Run, engine_manifest
from tests.support.onnx_graphs import images, quantized, saved

TRT = common_pb2.RUNTIME_TENSORRT
HERE = Machine("linux-x86_64", Gpu("NVIDIA L4", "8.9"), "580.95.05", {TRT: "10.13.3.9"})
without_gpu = pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
ARTIFACT = artifacts_pb2.Artifact(digest=f"sha256:{'e' * 64}")


@pytest.fixture
def graph(tmp_path: Path) -> OnnxModel:
    loaded = load_graph(saved(tmp_path, "m", quantized()), "f")
    return OnnxModel(loaded, reports_pb2.MEASURED_FORM_ONNX_TRT, 1, "f")


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


def model_on(gpu: FakeGpu, run: Run, monkeypatch: pytest.MonkeyPatch, **options: Any) -> EngineModel:
    monkeypatch.setitem(sys.modules, "tensorrt", FakeRuntime(gpu, run, **options))
    return EngineModel(b"plan", engine_manifest(ARTIFACT), gpu)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9, 20])
def test_any_number_of_images_runs_in_batches_of_the_profile(
    gpu: FakeGpu, graph: OnnxModel, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    model = model_on(gpu, graph.run, monkeypatch)
    assert (model.input_shape, model.num_classes, model.batch) == ((3, 8, 8), 5, (2, 4, 8))
    assert model.device_memory_bytes == 4 * 8 * (3 * 8 * 8 + 5)
    gpu.batches.clear()
    pixels = images(count)
    assert np.array_equal(model.run(pixels), graph.run(pixels))
    assert all(2 <= size <= 8 for size in gpu.batches)
    assert len(gpu.batches) == -(-count // 8)
    model.close()
    assert gpu.memory == {}


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"fail": "start"}, FailedPreconditionError, "tensorrt 10.13.3.9 cannot start: CUDA .* error: 35"),
        ({"fail": "load"}, FailedPreconditionError, "refuses the engine: .*magicTag"),
        ({"fail": "prepare"}, FailedPreconditionError, "cannot prepare"),
        ({"fail": "run"}, InternalError, "could not run"),
        ({"limits": (2, 4)}, InternalError, "take a batch of 8: .*out of the profile"),
        ({"shapes": ((-1, 3, 8, 8), (-1, 7))}, InvalidArgumentError, "other inputs and outputs"),
    ],
)
def test_failures_carry_the_runtimes_words(
    gpu: FakeGpu, graph: OnnxModel, monkeypatch: pytest.MonkeyPatch, options: Any, kind: type[GranqError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        model_on(gpu, graph.run, monkeypatch, **options)


def test_logits_that_are_no_numbers_are_refused(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="NaN"):
        model_on(gpu, lambda pixels: np.full((len(pixels), 5), np.nan, np.float32), monkeypatch)


def test_figures_at_each_batch(gpu: FakeGpu, graph: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(pixels: Any) -> Any:
        logits = graph.run(pixels)
        logits[0] = np.roll(logits[0], 1)
        return logits

    model = model_on(gpu, shifted, monkeypatch)
    pixels = images(3)
    found = measure_batches(model, pixels, graph.run, 10, 60.0, lambda: None)
    assert [row.batch for row in found] == [2, 4, 8]
    assert [row.agreement for row in found] == [50.0, 75.0, 87.5]
    expected = graph.run(pixels[:1])[0]
    assert found[0].largest_difference == pytest.approx(np.abs(expected - np.roll(expected, 1)).max())
    assert {(row.latency_ms_mean, row.latency_ms_p50, row.latency_ms_p99) for row in found} == {(2.0, 2.0, 2.0)}
    assert [row.images_per_second for row in found] == [1000.0, 2000.0, 4000.0]
    alone = measure_batches(model, pixels, None, 10, 60.0, lambda: None)
    assert not any(row.HasField("agreement") or row.HasField("largest_difference") for row in alone)


def request_of(bench: EvaluatorBench, **changes: Any) -> evaluator_pb2.StartEvaluateRequest:
    np.savez(bench.datasets / "set.npz", images=images(12), labels=np.zeros(12, int))
    onnx = bench.put(quantized())
    request = evaluator_pb2.StartEvaluateRequest(
        onnx_float=onnx,
        onnx_trt=onnx,
        dataset=common_pb2.Dataset(path="set.npz", format=common_pb2.DATASET_FORMAT_NPZ),
        batch_size=5,
        engine=engine_manifest(bench.store.put_bytes(b"plan"), onnx.digest),
    )
    request.engine.MergeFrom(reports_pb2.EngineManifest(**changes))
    return request


def test_an_engine_is_measured_beside_the_graphs(
    tmp_path: Path, gpu: FakeGpu, graph: OnnxModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = EvaluatorBench(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeRuntime(gpu, graph.run))
    monkeypatch.setattr(engine_model, "this_machine", lambda: HERE)
    monkeypatch.setattr(evaluation, "find_gpu", lambda: HERE.gpu)
    monkeypatch.setattr(evaluation, "Cuda", lambda: gpu)
    result = evaluate_graphs(request_of(bench), bench.context)
    rows = {row.form: row for row in result.measurements}
    row = rows[reports_pb2.MEASURED_FORM_ENGINE]
    assert list(rows)[-1] == row.form
    assert (row.runtime, row.device, row.latency_batch) == ("tensorrt 10.13.3.9", "NVIDIA L4", 4)
    assert row.accuracy == rows[reports_pb2.MEASURED_FORM_ONNX_TRT].accuracy
    assert [(b.batch, b.agreement, b.largest_difference) for b in row.batches] == [(n, 100.0, 0.0) for n in (2, 4, 8)]
    assert row.device_memory_bytes > 0
    assert gpu.closed


def test_a_foreign_engine_is_refused_before_it_is_loaded(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = EvaluatorBench(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(engine_model, "this_machine", lambda: HERE)
    monkeypatch.setattr(evaluation, "Cuda", lambda: pytest.fail("the GPU was touched"))
    request = request_of(bench, runtime_version="10.3.0", platform="linux-aarch64")
    with pytest.raises(FailedPreconditionError, match=r"linux-aarch64.*; it needs TensorRT 10\.3\.0 exactly") as caught:
        evaluate_graphs(request, bench.context)
    assert (caught.value.reason, caught.value.field) == ("ENGINE_FOREIGN", "engine")
    with pytest.raises(InvalidArgumentError, match="built from another graph"):
        evaluate_graphs(request_of(bench, onnx_digest=f"sha256:{'1' * 64}"), bench.context)


@without_gpu
def test_this_machine_says_what_it_lacks() -> None:
    with pytest.raises(FailedPreconditionError, match=r"needs an NVIDIA GPU of compute capability 8\.9") as caught:
        require_fit(engine_manifest(ARTIFACT))
    assert caught.value.reason == "ENGINE_FOREIGN"
    with pytest.raises(FailedPreconditionError, match="engines run on an NVIDIA GPU only") as caught:
        Cuda()
    assert caught.value.reason == "GPU_REQUIRED"


# --- the driver's library


class FakeDriver:
    """libcuda with one device; keeps to the declared argument types, and to what may be given."""

    def __init__(self, status: dict[str, int] | None = None) -> None:
        self.status = status or {}
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        function = ctypes.CFUNCTYPE(ctypes.c_int, *self._types(name))(lambda *arguments: self._answer(name, arguments))
        setattr(self, name, function)
        return function

    @staticmethod
    def _types(name: str) -> tuple[Any, ...]:
        from services.evaluator.cuda import _ARGUMENTS

        return _ARGUMENTS[name]

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> int:
        self.calls.append(name)
        if name in self.status:
            return self.status[name]
        first = arguments[0]
        match name:
            case "cuGetErrorString":
                arguments[1][0] = b"no CUDA-capable device is detected"
            case "cuMemGetInfo_v2":
                first[0], arguments[1][0] = 30, 100
            case "cuMemAlloc_v2":
                buffer = ctypes.create_string_buffer(arguments[1])
                first[0] = ctypes.addressof(buffer)
                self.memory[first[0]] = buffer
            case "cuMemFree_v2":
                del self.memory[first]
            case "cuMemcpyHtoDAsync_v2" | "cuMemcpyDtoHAsync_v2":
                ctypes.memmove(first, arguments[1], arguments[2])
            case "cuEventElapsedTime":
                first[0] = 1.5
            case "cuStreamCreate" | "cuEventCreate" | "cuDevicePrimaryCtxRetain":
                first[0] = (1 << 40) + len(self.calls)
        return 0


def test_the_drivers_calls() -> None:
    driver = FakeDriver()
    cuda = Cuda(lambda name: driver if name == LIBRARY else None)
    assert cuda.stream > 1 << 40
    assert cuda.used_bytes() == 70
    address = cuda.allocate(4 * 6)
    sent = np.arange(6, dtype=np.float32).reshape(2, 3)
    cuda.upload(address, sent)
    assert np.array_equal(cuda.download(address, (2, 3)), sent)
    assert driver.calls[-1] == "cuStreamSynchronize"
    driver.calls.clear()
    assert cuda.milliseconds(lambda: driver.calls.append("work")) == 1.5
    assert driver.calls == ["cuEventRecord", "work", "cuEventRecord", "cuEventSynchronize", "cuEventElapsedTime"]
    cuda.free(address)
    cuda.close()
    assert driver.memory == {}
    assert driver.calls[-2:] == ["cuStreamDestroy_v2", "cuDevicePrimaryCtxRelease_v2"]


def test_the_drivers_errors() -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(FailedPreconditionError, match=r"libcuda\.so\.1 is not there"):
        Cuda(absent)
    with pytest.raises(FailedPreconditionError, match=r"cuInit: no CUDA-capable device is detected \(100\)"):
        Cuda(lambda name: FakeDriver({"cuInit": 100}))
    cuda = Cuda(lambda name: FakeDriver({"cuMemAlloc_v2": 2}))
    with pytest.raises(ResourceExhaustedError, match="no memory left"):
        cuda.allocate(1 << 40)
    cuda = Cuda(lambda name: FakeDriver({"cuEventRecord": 700}))
    with pytest.raises(InternalError, match=r"\(700\)"):
        cuda.milliseconds(lambda: None)
