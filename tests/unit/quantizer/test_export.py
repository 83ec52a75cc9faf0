"""The exported files compute what the integer form computes. Networks are small; every kind of layer is there."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from services.common.onnx_runtime_flavour import to_onnx_runtime
from services.quantizer.calibrate import calibrate
from services.quantizer.config import ActivationGranularity, LayerBits, Quantization
from services.quantizer.integer import (
    float_operations,
    integer_layers,
    is_exact,
    packed_bytes,
    to_integer,
)
from services.quantizer.integer_modules import Codes, IntegerConv2d
from services.quantizer.learned import ActivationQuantizer, CodeRange, QuantizedConv2d
from services.quantizer.onnx_export import export_trt
from services.quantizer.student import build_student
from tests.support.models import Bottleneck, Residual, captured

torch.set_num_threads(1)
SHAPE = (3, 8, 8)


def run(model: onnx.ModelProto, images: torch.Tensor, optimize: bool, folder: Path) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Kernels without VNNI add pairs of products in 16 bits; this keeps signed inputs (codes up to 255) from saturating.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if optimize:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    else:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    return np.asarray(logits)


def quantized(model: nn.Module, quantization: Quantization) -> tuple[torch.fx.GraphModule, torch.Tensor]:
    student = build_student(captured(model, SHAPE), quantization)
    images = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))
    calibrate(student, images)
    return student, images


@pytest.mark.parametrize(
    ("model", "quantization", "at_once"),
    [
        (Residual(), Quantization(8, 8), 2),
        (Residual(), Quantization(3, 4, overrides={"fc": (8, 8), "project.0": (5, 6)}), 2),
        (Bottleneck(), Quantization(4, 8), 3),
        (Bottleneck(), Quantization(2, 8), 3),
    ],
    ids=["residual-w8a8", "residual-mixed", "bottleneck-w4a8", "bottleneck-w2a8"],
)
def test_both_files_compute_what_the_integer_form_computes(
    model: nn.Module, quantization: Quantization, at_once: int, tmp_path: Path
) -> None:
    student, images = quantized(model, quantization)
    integer = to_integer(student)
    assert is_exact(integer)
    with torch.no_grad():
        want = integer(images).numpy()
        simulated = student(images)
    assert (simulated.argmax(1).numpy() == want.argmax(1)).mean() > 0.9  # a flip at .5 may move a near tie
    trt = export_trt(integer, SHAPE)
    assert {o.version for o in trt.opset_import if not o.domain} == {21}
    assert np.array_equal(run(trt, images, optimize=False, folder=tmp_path), want)
    assert np.array_equal(run(trt, images[:3], optimize=False, folder=tmp_path), want[:3])  # the batch is free
    ort = to_onnx_runtime(trt)
    got = run(ort, images, optimize=True, folder=tmp_path)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert (got.argmax(1) == want.argmax(1)).all()
    kernels = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    # In front of a sum, a mean or the logits layers work in float32, on integers, and with bounds that keep these apart
    # from their factors.
    assert kernels["MatMulInteger"] == 1
    assert kernels["QLinearConv"] == at_once
    assert kernels["FusedConv"] == len(integer_layers(integer)) - at_once - 1
    assert not {"Conv", "ConvInteger", "Gemm", "MatMul"} & set(kernels)


def test_scales_fold_into_producers_and_rectifiers_vanish() -> None:
    student, _ = quantized(Bottleneck(), Quantization(4, 4))
    integer = to_integer(student)
    assert not any(isinstance(module, (nn.ReLU, nn.ReLU6)) for module in integer.modules())
    unfolded = [
        name for name, module in integer.named_modules() if isinstance(module, Codes) and module.inverse is not None
    ]
    assert len(unfolded) == 2  # the image, and the sum of the bottleneck and its skip
    assert len(float_operations(integer)) == 1  # that sum


def test_accumulator_bound_holds_for_the_worst_input() -> None:
    student, _ = quantized(Residual(), Quantization(8, 8))
    for _, layer, _ in integer_layers(to_integer(student)):
        reach = torch.where(layer.codes > 0, layer.input_range.hi, layer.input_range.lo).double() * layer.codes.double()
        worst = reach.flatten(1).sum(1) + layer.bias.double()
        assert worst.abs().max() <= layer.accumulator_bound < 2**24


@given(st.integers(0, 2**32 - 1), st.sampled_from([CodeRange(0, 255), CodeRange(-127, 128), CodeRange(-200, 55)]))
@settings(max_examples=25, deadline=None)
def test_a_layer_of_shifted_codes_sums_what_the_codes_themselves_give(seed: int, codes_read: CodeRange) -> None:
    rng = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    quantizer = ActivationQuantizer(4, codes_read, 8)
    layer = QuantizedConv2d(conv, quantizer, LayerBits(8, 8))
    layer.log_step.data.copy_((layer.folded_weight().detach().flatten(1).abs().amax(1) / 127).log())
    codes = torch.randint(codes_read.lo, codes_read.hi + 1, (2, 4, 5, 6), generator=rng).float()
    integer = IntegerConv2d(layer)
    weight, bias = layer.weight_codes().detach(), torch.round(layer.bias.detach() / layer.log_step.detach().exp())
    wanted = F.conv2d(codes, weight, bias, padding=1, groups=2) * integer.factor
    integer.padding = (0, 0)
    shifted = F.pad(codes - codes_read.shift, (1, 1, 1, 1), value=-codes_read.shift)
    assert float(shifted.min()) >= -128
    assert float(shifted.max()) <= 127
    assert torch.equal(integer(shifted), wanted)


def test_whole_bytes_cost_no_operation_behind_a_layer() -> None:
    student, images = quantized(Bottleneck(), Quantization(4, 8))
    wide = [m for m in student.modules() if isinstance(m, ActivationQuantizer) and m.code_range == CodeRange(0, 255)]
    integer = to_integer(student)
    made = [m for m in integer.modules() if isinstance(m, Codes)]
    assert wide
    assert [m.shift for m in made if m.shift] == [128], "of the pooled features, which no layer makes"
    assert {(m.code_range.lo, m.code_range.hi) for m in made} <= {(-128, 127), (0, 127)}
    with torch.no_grad():
        near = integer(images) - student(images)
    assert float(near.square().mean()) < 1e-3 * float(student(images).square().mean())


def test_packed_size_counts_bits() -> None:
    sizes = []
    for bits in (2, 4, 8):
        student, _ = quantized(Residual(), Quantization(bits, 8))
        sizes.append(packed_bytes(to_integer(student)))
    weights = sum(layer.codes.numel() for _, layer, _ in integer_layers(to_integer(student)))
    assert sizes[2] - sizes[1] == weights // 2
    assert sizes[1] - sizes[0] == weights // 4


def test_the_same_model_quantizes_to_the_same_file() -> None:
    files = [
        export_trt(to_integer(quantized(Residual(), Quantization(4, 4))[0]), SHAPE).SerializeToString() for _ in "ab"
    ]
    assert files[0] == files[1]


def test_simulated_students_keep_what_the_paper_keeps_in_float() -> None:
    quantization = Quantization(4, 4, activation_granularity=ActivationGranularity.PER_SAMPLE_CHANNEL)
    student = build_student(captured(Residual(), SHAPE), quantization)
    names = [name for name, _ in student.named_modules() if name.startswith("fake_")]
    assert len(names) == 4  # after each ReLU, nowhere else
    images = torch.randn(4, *SHAPE)
    with torch.no_grad():
        assert torch.isfinite(student(images)).all()
