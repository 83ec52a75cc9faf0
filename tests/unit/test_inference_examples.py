"""The inference examples do what they say; the one for TensorRT on stand-ins, and for real where there is a GPU."""

import ast
import ctypes
import importlib
import importlib.util
import io
import subprocess
import sys
import tokenize
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from granq.engines.machine import find_gpu
from granq.v1 import common_pb2, evaluator_pb2, reports_pb2
from services.evaluator.graph import load_graph
from services.evaluator.jobs import build_engine
from services.evaluator.onnx_runtime import OnnxModel
from services.evaluator.saturation import with_weight_zero_points
from tests.support.evaluator_bench import EvaluatorBench
from tests.support.fake_engine import FakeGpu, FakeRuntime
from tests.support.onnx_graphs import images, quantized, saved

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "inference"
SEED = 4  # of a graph that sees more than one class in the images
CALLS = ("cudaMalloc", "cudaMemcpy", "cudaMemcpyKind", "cudaStreamCreate")
MOST_LINES = 30
WORDS = {tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING}


def expected(folder: Path, form: reports_pb2.MeasuredForm, **options: Any) -> list[int]:
    # Zero points are stated, as the exporter does.
    graph = load_graph(saved(folder, "m", with_weight_zero_points(quantized(seed=SEED, **options))), "f")
    classes: list[int] = OnnxModel(graph, form, 1, "f").run(images(6)).argmax(1).tolist()
    return classes


def printed(script: str, folder: Path, *arguments: str | Path) -> list[int]:
    np.save(folder / "images.npy", images(6))
    command = [sys.executable, EXAMPLES / script, *arguments, folder / "images.npy"]
    return [int(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(example: Path) -> None:
    source = example.read_text("utf-8")
    code = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type in WORDS}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef):
            first = node.body[0]
            code -= set(range(first.lineno, (first.end_lineno or 0) + 1)) if ast.get_docstring(node) else set()
    assert len(code) <= MOST_LINES


def test_onnxruntime_does_not_saturate_where_there_is_no_vnni(tmp_path: Path) -> None:
    saved(tmp_path, "m", quantized(seed=SEED, unsigned=True))
    options = imported("onnxruntime_inference").load(str(tmp_path / "m.onnx")).get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"


def test_onnxruntime(tmp_path: Path) -> None:
    classes = expected(tmp_path, reports_pb2.MEASURED_FORM_ONNX_ORT, unsigned=True)
    assert printed("onnxruntime_inference.py", tmp_path, tmp_path / "m.onnx") == classes
    assert len(set(classes)) > 1


class FakeCudart(ModuleType):
    """cuda.bindings.runtime over a FakeGpu."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__("cuda.bindings.runtime")
        self._gpu = gpu
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        return 0, self._gpu.stream

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        return 0, self._gpu.allocate(size)

    def cudaMemcpy(self, to: int, source: int, size: int, kind: int) -> tuple[int]:  # noqa: N802
        if kind == 1:
            self._gpu.upload(to, np.frombuffer(ctypes.string_at(source, size), np.uint8))
        else:
            ctypes.memmove(to, bytes(self._gpu.memory[source]), size)
        return (0,)


def test_tensorrt_on_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    graph = OnnxModel(
        load_graph(saved(tmp_path, "m", quantized(seed=SEED)), "f"), reports_pb2.MEASURED_FORM_ONNX_TRT, 1, "f"
    )
    runtime = FakeRuntime(gpu, graph.run)
    cudart = FakeCudart(gpu)
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=cudart))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cudart)
    example = imported("tensorrt_inference")
    classes: NDArray[np.intp] = example.classify(runtime, b"plan", images(6))
    assert classes.tolist() == graph.run(images(6)).argmax(1).tolist()
    with pytest.raises(RuntimeError, match="cudaErrorNoDevice"):
        example.must((_Status(), 0))


class _Status(int):
    """A status that is not 0, with its name."""

    def __new__(cls) -> "_Status":
        return super().__new__(cls, 100)

    def __str__(self) -> str:
        return "cudaErrorNoDevice"


def test_cuda_python_has_what_the_example_uses() -> None:
    cudart = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    assert [name for name in CALLS if not hasattr(cudart, name)] == []


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu() is None, reason="no GPU")
def test_tensorrt_rtx_on_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("cuda.bindings.runtime")
    bench = EvaluatorBench(tmp_path)
    target = common_pb2.EngineTarget(runtime=common_pb2.RUNTIME_TENSORRT_RTX)
    built = build_engine(
        evaluator_pb2.StartBuildEngineRequest(onnx_trt=bench.put(quantized(seed=SEED)), target=target), bench.context
    )
    plan = bench.store.local_path(built.engine.manifest.engine.digest)
    classes = expected(tmp_path, reports_pb2.MEASURED_FORM_ONNX_TRT)
    assert printed("tensorrt_inference.py", tmp_path, "tensorrt_rtx", plan) == classes
