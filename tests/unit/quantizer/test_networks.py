"""The whole way of a network, from its graph to both files, for torchvision's families and for odd graphs."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import fx, nn
from torch.nn import functional as F

from benchmarks.logistic import borrow_sigmoid
from granq.v1 import common_pb2, reports_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.common.models import load_model
from services.common.onnx_runtime_flavour import to_onnx_runtime
from services.evaluator.graph import load_graph
from services.evaluator.onnx_runtime import OnnxModel
from services.quantizer.batches import Batch, ReplaySource
from services.quantizer.calibrate import calibrate
from services.quantizer.config import GeneratorLosses, Quantization, Training
from services.quantizer.graph import layers, module_of
from services.quantizer.integer import carries_codes, float_operations, integer_layers, is_exact, to_integer
from services.quantizer.integer_modules import EXACT_LIMIT, Codes
from services.quantizer.learned import ActivationQuantizer, QuantizedLayer, QuantizedLinear
from services.quantizer.onnx_export import export_trt
from services.quantizer.student import build_student, no_grad_copy
from services.quantizer.training import Trainer
from tests.support.models import captured, remember, settle
from tests.support.networks import NETWORKS, SHAPE

torch.set_num_threads(1)

# What works on floats in each network, as the report lists it.
FLOATS = {
    "resnext": {"add": 4, "ReLU": 1},  # the last sum has one pixel, so no pooling of codes clips it
    "mobilenet_v2": {"add": 1},
    "mobilenet_v3": {"Hardswish": 7, "Hardsigmoid": 2, "mul": 2, "add": 1},
    "efficientnet_b": {"SiLU": 7, "Sigmoid": 2, "mul": 2, "add": 1},
    "regnet_y": {"Sigmoid": 2, "mul": 2, "add": 2},
    "densenet_bc": {"cat": 6, "Affine": 6, "ReLU": 1},  # layers read the BatchNorms behind the concatenations
    "shufflenet_v2": {},
    "vgg_bn": {},
    "Idioms": {"Affine": 1, "ReLU6": 1, "add": 1, "LeakyReLU": 1, "ReLU": 1, "cat": 1},
    "Branches": {"add": 1, "neg": 1, "cat": 1},
    "PreActivation": {"sub": 1, "truediv": 1, "Affine": 3, "add": 2},
    "SamePadding": {},
    "NarrowStem": {"add": 1},
}

# Layers that ONNX Runtime runs as INT8 kernels, of all: those whose output is rounded at once, and linear ones.
INT8 = {
    "resnext": (9, 18),
    "mobilenet_v2": (10, 11),
    "mobilenet_v3": (7, 16),
    "efficientnet_b": (2, 12),
    "regnet_y": (8, 14),
    "densenet_bc": (6, 11),
    "shufflenet_v2": (20, 21),
    "vgg_bn": (3, 7),
    "Idioms": (3, 6),
    "Branches": (5, 8),
    "PreActivation": (1, 4),
    "SamePadding": (5, 5),
    "NarrowStem": (3, 6),
}


def images(count: int = 16) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def trained(model: fx.GraphModule, quantization: Quantization) -> fx.GraphModule:
    """Return a student after calibration and two steps."""
    student = build_student(model, quantization)
    calibrate(student, images())
    with torch.no_grad():
        logits = model(images())
    source = ReplaySource(Batch(images(), logits.argmax(1), logits), 8, 0, torch.device("cpu"))
    training = Training(co_train=False, epochs=1, iterations_per_epoch=2, warmup_epochs=0, learning_rate=1e-5)
    trainer = Trainer(student, training.for_family(quantization), GeneratorLosses(), source, no_grad_copy(model))
    before = {name: value.clone() for name, value in student.named_parameters()}
    assert list(trainer.run(lambda progress: None)) == [1, 2]
    assert all(torch.isfinite(value).all() for value in student.parameters())
    still = [name for name, value in student.named_parameters() if torch.equal(value, before[name])]
    assert not [name for name in still if name.endswith("log_step") or "codes_" in name]
    return student


def opened(model: onnx.ModelProto, form: Any, folder: Path) -> OnnxModel:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return OnnxModel(load_graph(folder / "model.onnx", "model"), form, 1, "model")


@pytest.mark.parametrize("name", NETWORKS)
def test_from_graph_to_both_files(name: str, tmp_path: Path) -> None:
    model = captured(NETWORKS[name](), SHAPE)
    bits = 4 if list(NETWORKS).index(name) % 2 else 8
    student = trained(model, Quantization(bits, bits))
    integer = to_integer(student)
    found = integer_layers(integer)
    assert [layer for layer, _, _ in found] == [str(node.target) for node, _ in layers(model)]
    assert is_exact(integer)
    assert Counter(text.rpartition("(")[2][:-1] for text in float_operations(integer)) == FLOATS[name]
    trt = export_trt(integer, SHAPE)
    borrow_sigmoid(integer)
    with torch.no_grad():
        want = integer(images()).numpy()
    assert np.array_equal(opened(trt, reports_pb2.MEASURED_FORM_ONNX_TRT, tmp_path).run(images().numpy()), want)
    ort = opened(to_onnx_runtime(trt), reports_pb2.MEASURED_FORM_ONNX_ORT, tmp_path)
    got = ort.run(images().numpy())
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert (got.argmax(1) == want.argmax(1)).all()
    assert ort.kernels is not None
    assert (ort.kernels.int8, ort.kernels.total) == INT8[name]
    assert ort.kernels.total == len(found)


@pytest.mark.parametrize("name", ["SamePadding", "NarrowStem", "mobilenet_v2"])
def test_an_image_at_its_own_levels_is_padded_alike_in_both_files(name: str, tmp_path: Path) -> None:
    levels = torch.randint(256, (8, *SHAPE), generator=torch.Generator().manual_seed(0)).float()
    read = (levels - 127) / 128
    pixels = torch.full((3,), -127 / 128), torch.ones(3)
    student = build_student(captured(NETWORKS[name](), SHAPE), Quantization(8, 8), pixels)
    calibrate(student, read)
    integer = to_integer(student)
    trt = export_trt(integer, SHAPE)
    assert [node.op_type for node in trt.graph.node][:4] == ["Pad", "Mul", "Sub", "QuantizeLinear"]
    with torch.no_grad():
        want, simulated = integer(read).numpy(), student(read).numpy()
    assert np.array_equal(opened(trt, reports_pb2.MEASURED_FORM_ONNX_TRT, tmp_path).run(read.numpy()), want)
    ort = opened(to_onnx_runtime(trt), reports_pb2.MEASURED_FORM_ONNX_ORT, tmp_path)
    assert np.abs(ort.run(read.numpy()) - want).max() <= 1e-5 * np.abs(want).max()
    assert ort.kernels is not None
    assert (ort.kernels.int8, ort.kernels.total) == INT8[name]
    assert np.abs(simulated - want).max() <= 0.02 * np.abs(want).max()


def test_a_named_architecture_becomes_a_student(tmp_path: Path) -> None:
    """RegNet computes its sizes with tensors when it is built, which must work without memory for its weights."""
    name = "regnet_y_400mf"
    save_file(
        settle(torchvision.models.get_model(name, weights=None, num_classes=5)).state_dict(), tmp_path / "weights"
    )
    store = ArtifactStore((tmp_path / "store").as_uri())
    artifact = store.put_file(tmp_path / "weights")
    model = load_model(common_pb2.ModelSource(artifact=artifact, architecture=name, input_shape=SHAPE), store)
    student = build_student(model.module, Quantization(4, 4))
    calibrate(student, images(2))
    integer = to_integer(student)
    assert len(integer_layers(integer)) == 86
    assert is_exact(integer)


@pytest.mark.parametrize(
    ("name", "words"), [("vgg11", "has no BatchNorm"), ("vit_b_16", "LayerNorm"), ("squeezenet1_1", "has no BatchNorm")]
)
def test_architectures_without_batch_norm_are_refused_before_their_weights_are_looked_at(
    name: str, words: str, tmp_path: Path
) -> None:
    save_file({"any": torch.zeros(1)}, tmp_path / "weights")
    store = ArtifactStore((tmp_path / "store").as_uri())
    artifact = store.put_file(tmp_path / "weights")
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        load_model(common_pb2.ModelSource(artifact=artifact, architecture=name, input_shape=(3, 32, 32)), store)
    assert (caught.value.reason, caught.value.field) == ("BATCH_NORM_MISSING", "model.architecture")
    assert name in caught.value.message


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)
        self.mix, self.fc = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        logits: torch.Tensor = self.fc(self.mix(tokens).mean(1))
        return logits


def test_layers_that_read_tokens_are_refused_by_name() -> None:
    with pytest.raises(FailedPreconditionError, match="layer mix reads a tensor of shape N×64×8") as caught:
        build_student(captured(Tokens(), SHAPE), Quantization(8, 8))
    assert caught.value.reason == "LAYER_INPUT_UNSUPPORTED"


def test_codes_keep_their_scales_through_concatenation_split_and_shuffle() -> None:
    """What is carried as codes must be what the float graph carries: at 8 bits the two stay close in every channel."""
    model = remember(captured(NETWORKS["shufflenet_v2"](), SHAPE), images())
    student = build_student(model, Quantization(8, 8))
    calibrate(student, images())
    with torch.no_grad():
        want, got = model(images()), student(images())
    assert (got - want).norm() < 0.1 * want.norm()
    integer = to_integer(student)
    moved = [n for n in integer.graph.nodes if n.op == "call_function" and n.target is torch.cat]
    assert len(moved) == 4  # one in each unit
    assert all(carries_codes(integer, node) for node in moved)
    unfolded = [m for m in integer.modules() if isinstance(m, Codes) and m.inverse is not None]
    assert len(unfolded) == 1  # the image; every other scale sits in the layer that makes the values


def test_padding_moves_codes_so_that_ceilings_before_it_count() -> None:
    model = captured(NETWORKS["SamePadding"](), SHAPE)
    student = build_student(model, Quantization(8, 8), (torch.full((3,), -1.0), torch.full((3,), 1.0)))
    made = {name: m for name, m in student.named_modules() if isinstance(m, ActivationQuantizer)}
    assert not [name for name in made if "pad" in name]
    assert [float(m.reach.max()) for m in made.values() if m.reach is not None].count(6.0) == 4
    assert [m.ceiling for m in made.values()].count(6.0) == 4  # three ReLU6, and their mean at the end
    proto = export_trt(to_integer(student), SHAPE)
    pads = [node for node in proto.graph.node if node.op_type == "Pad"]
    assert len(pads) == 1, "before the pooling; convolutions take the others along"


def test_signed_and_unsigned_branches_are_quantized_behind_their_concatenation() -> None:
    model = captured(NETWORKS["Branches"](), SHAPE)
    student = build_student(model, Quantization(4, 4))
    cats = [node for node in student.graph.nodes if node.target is torch.cat]
    assert [isinstance(module_of(student, node.all_input_nodes[0]), ActivationQuantizer) for node in cats] == [
        True,
        False,
    ]


def test_two_uses_of_a_layer_that_differ_in_their_factors_alone(tmp_path: Path) -> None:
    student = build_student(captured(NETWORKS["Branches"](), SHAPE), Quantization(4, 4))
    calibrate(student, images())
    again = student.get_submodule("signed.0_1")
    assert isinstance(again, QuantizedLayer)
    again.log_step.data += 1e-6  # no code changes by that
    integer = to_integer(student)
    trt = export_trt(integer, SHAPE)
    with torch.no_grad():
        want = integer(images()).numpy()
    got = opened(to_onnx_runtime(trt), reports_pb2.MEASURED_FORM_ONNX_ORT, tmp_path).run(images().numpy())
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad((x - 0.5) / 0.25, (0, 1, 0, 1))
        logits: torch.Tensor = self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))
        return logits


def test_an_image_that_the_model_normalizes_and_pads_keeps_the_bits_of_the_input() -> None:
    student = build_student(captured(Normalized(), SHAPE), Quantization(4, 4, input_bits=8))
    assert [m.bits for m in student.modules() if isinstance(m, ActivationQuantizer)] == [
        8,
        4,
        8,
    ]  # image, classifier, mean


def test_channels_whose_sums_could_leave_the_exact_range_get_a_coarser_step() -> None:
    model = captured(nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(1800, 4)), SHAPE)
    student = build_student(model, Quantization(8, 8))
    calibrate(student, images())
    layer = student.get_submodule("3")
    assert isinstance(layer, QuantizedLinear)
    layer.bias.data[1] = 1e6  # far more than the sums: 2^24 units of the step would not reach it
    (_, lowered, _) = integer_layers(to_integer(student))[1]
    assert lowered.accumulator_bound < EXACT_LIMIT
    step = layer.log_step.detach().exp()
    assert torch.equal(lowered.factor[[0, 2, 3]], step[[0, 2, 3]])
    assert lowered.factor[1] > step[1]
    assert float(lowered.bias[1] * lowered.factor[1]) == pytest.approx(1e6, rel=1e-6)
