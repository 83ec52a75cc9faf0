from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from granq.v1 import reports_pb2
from services.common.errors import InvalidArgumentError
from services.evaluator.graph import load_graph
from services.evaluator.onnx_runtime import KernelCounts, OnnxModel, count_kernels
from services.evaluator.saturation import codes_may_exceed_127, with_weight_zero_points
from tests.support.onnx_graphs import images, make_model, quantized, saved

FLOAT, TRT, ORT = (
    reports_pb2.MEASURED_FORM_FLOAT,
    reports_pb2.MEASURED_FORM_ONNX_TRT,
    reports_pb2.MEASURED_FORM_ONNX_ORT,
)


def opened(folder: Path, model: onnx.ModelProto, form: Any) -> OnnxModel:
    return OnnxModel(load_graph(saved(folder, "m", model), "onnx"), form, 1, "onnx")


def by_hand(model: onnx.ModelProto, pixels: NDArray[np.float32], low: int, high: int) -> NDArray[np.float64]:
    """Compute a Builder's onnx_trt classifier in integers and float32 factors, written from its description."""
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}

    def codes(x: NDArray[Any]) -> NDArray[np.int64]:
        rounded: NDArray[np.int64] = np.rint(np.clip(x, low, high)).astype(np.int64)
        return rounded

    x: NDArray[Any] = codes(pixels)
    for name in ("conv1", "conv2"):
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3)
        )
        sums = np.einsum("nchwij,ocij->nohw", windows, held[f"{name}_codes"].astype(np.int64))
        sums = sums + held[f"{name}_bias"].astype(np.int64).reshape(1, -1, 1, 1)
        x = codes(sums.astype(np.float32) * held[f"{name}_factor"])
    x = codes(x.mean(axis=(2, 3), dtype=np.float32))
    sums = x @ held["logits_codes"].astype(np.int64).T + held["logits_bias"].astype(np.int64)
    result: NDArray[np.float64] = (sums.astype(np.float32) * held["logits_factor"]).astype(np.float64)
    return result


@pytest.mark.parametrize(("low", "high"), [(0, 127), (-128, 127), (0, 15), (-7, 7)])
def test_onnx_trt_is_exact_integer_arithmetic(tmp_path: Path, low: int, high: int) -> None:
    model = quantized(low=low, high=high)
    pixels = images(6, low=low - 5, high=high + 5)
    runner = opened(tmp_path, model, TRT)
    np.testing.assert_array_equal(runner.run(pixels), by_hand(model, pixels, low, high))
    assert runner.kernels is None


@pytest.mark.parametrize(("low", "high"), [(0, 127), (-128, 127), (0, 15), (-7, 7)])
def test_onnx_ort_equals_onnx_trt_whatever_the_processor(tmp_path: Path, low: int, high: int) -> None:
    # Signed codes of 8 bits are those that kernels without VNNI saturate on.
    pixels = images(6, low=low - 5, high=high + 5)
    exact = opened(tmp_path, quantized(low=low, high=high), TRT).run(pixels)
    runner = opened(tmp_path, quantized(low=low, high=high, unsigned=True), ORT)
    np.testing.assert_allclose(runner.run(pixels), exact, rtol=0, atol=1e-5 * abs(exact).max())
    assert runner.kernels == KernelCounts(int8=2, total=3)


def test_saturation_is_real_where_vnni_is_missing(tmp_path: Path) -> None:
    """Shows why the option is set: without it, large codes give wrong sums on such processors."""
    flags = Path("/proc/cpuinfo").read_text()
    if "vnni" in flags or "avx2" not in flags:
        pytest.skip("this processor's INT8 kernels do not saturate")
    model = extreme_matmul()
    pixels = np.full((2, 3, 8, 8), 127, np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wrong = session.run(None, {"images": pixels})[0]
    right = opened(tmp_path, model, ORT).run(pixels)
    assert abs(right - 127.0 * 127 * 192).max() == 0
    assert abs(wrong - right).max() > 1000


def extreme_matmul() -> onnx.ModelProto:
    """Return a MatMulInteger whose input codes are 255 and whose weights are 127."""
    constants: dict[str, NDArray[np.generic]] = {
        "one": np.array(1, np.float32),
        "zero": np.array(128, np.uint8),
        "weight": np.full((192, 5), 127, np.int8),
        "weight_zero": np.array(0, np.int8),
    }
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("QuantizeLinear", ["flat", "one", "zero"], ["codes"]),
        helper.make_node("MatMulInteger", ["codes", "weight", "zero", "weight_zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["logits"], to=onnx.TensorProto.FLOAT),
    ]
    return make_model(nodes, constants)


@pytest.mark.parametrize(
    ("options", "exceed"),
    [
        ({"unsigned": True}, False),
        ({"unsigned": True, "high": 255}, True),
        ({"unsigned": True, "low": -128}, True),
        ({"unsigned": True, "low": -7, "high": 7}, True),
        ({}, False),
    ],
)
def test_codes_above_127_are_found(options: dict[str, Any], exceed: bool) -> None:
    assert codes_may_exceed_127(quantized(**options)) is exceed


def test_zero_points_are_added_to_a_copy() -> None:
    model = quantized(unsigned=True)
    before = model.SerializeToString()
    copy = with_weight_zero_points(model)
    onnx.checker.check_model(copy, full_check=True)
    weights = [n for n in copy.graph.node if n.op_type == "DequantizeLinear" and n.input[0].endswith("logits_codes")]
    zeros = numpy_helper.to_array(next(t for t in copy.graph.initializer if t.name == weights[0].input[2]))
    assert zeros.dtype == np.int8
    assert zeros.tolist() == [0] * 5
    assert model.SerializeToString() == before


def test_float_kernels_are_counted_as_such(tmp_path: Path) -> None:
    # Signed codes in signed bytes with a clip before them are what ONNX Runtime cannot fuse.
    runner = opened(tmp_path, quantized(), ORT)
    assert runner.kernels == KernelCounts(int8=0, total=3)
    integer = helper.make_graph([helper.make_node("ConvInteger", [], [])] * 2, "g", [], [])
    assert count_kernels(helper.make_model(integer)) == KernelCounts(2, 2)


def test_float_form_runs_optimized(tmp_path: Path) -> None:
    model = quantized()
    pixels = images(3)
    fast, exact = opened(tmp_path, model, FLOAT), opened(tmp_path, model, TRT)
    np.testing.assert_allclose(fast.run(pixels), exact.run(pixels), rtol=1e-3, atol=1e-2)
    assert fast.kernels is None


def test_any_batch_size_gives_the_same_rows(tmp_path: Path) -> None:
    pixels = images(7)
    # The last layer of the onnx_ort form is a float matrix product, whose sums depend on how it is cut into blocks.
    for form, options, tolerance in ((TRT, {}, 0.0), (ORT, {"unsigned": True}, 1e-5)):
        runner = opened(tmp_path, quantized(**options), form)
        rows = np.concatenate([runner.run(pixels[i : i + 1]) for i in range(7)])
        np.testing.assert_allclose(rows, runner.run(pixels), rtol=0, atol=tolerance)


def test_refused_graphs_name_their_field(tmp_path: Path) -> None:
    model = quantized()
    model.graph.node[0].op_type = "NoSuchOperation"
    with pytest.raises(InvalidArgumentError, match="cannot load") as caught:
        opened(tmp_path, model, FLOAT)
    assert caught.value.field == "onnx"


def test_logits_must_be_finite(tmp_path: Path) -> None:
    model = quantized()
    for tensor in model.graph.initializer:
        if tensor.name == "logits_factor":
            tensor.CopyFrom(numpy_helper.from_array(np.full((1, 5), np.nan, np.float32), tensor.name))
    with pytest.raises(InvalidArgumentError, match="NaN"):
        opened(tmp_path, model, TRT).run(images(1))
