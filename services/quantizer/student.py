"""Turns a float model into a student for quantization-aware training.

Two families, never mixed (see ``config.Quantization.deployable``):

* deployable: BatchNorm folded, every convolution and linear layer reads integer codes with a static learned scale per
  channel, weights symmetric per output channel (``learned.py``). Tensors that a layer and something else read, such as
  a residual shortcut, are quantized for both, so that an engine keeps them in 8 bits.
* simulated: the paper's form. Dynamic ranges after each ReLU, asymmetric weights, BatchNorm kept with frozen statistics
  and trained affine. The image, shortcuts before the addition, pooled features and linear bottlenecks stay float.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from services.common.errors import FailedPreconditionError
from services.quantizer.codes import CodesMean, CodesPool
from services.quantizer.config import Quantization, WeightGranularity
from services.quantizer.fake_quant import DynamicActivation, fake_quantize, weight_dims
from services.quantizer.graph import (
    BATCH_NORM_TYPES,
    channels_of,
    comes_from_image,
    fold_batch_norms,
    input_of,
    insert_module,
    layers,
    module_of,
    set_module,
)
from services.quantizer.learned import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from services.quantizer.placement import CodePlacement, pooling_windows

POOL_BITS = 8  # of the input of an average pooling that no layer reads: see codes.CodesMean


def layer_names(model: fx.GraphModule) -> list[str]:
    """Return the names of the layers that are quantized, in order of execution."""
    return [str(node.target) for node, _ in layers(model)]


def build_student(
    model: fx.GraphModule, quantization: Quantization, pixel_range: tuple[Tensor, Tensor] | None = None
) -> fx.GraphModule:
    """Return a student on ``model``'s weights; ``model`` is left as it is.

    Args:
        model: Module-level graph in evaluation mode with recorded shapes, as model intake returns it.
        quantization: Number formats.
        pixel_range: What black and white are in the model's input, C each; None where nothing is known. The range of a
            deployable student's image codes follows from it.

    Returns:
        Graph module, image N×C×H×W → logits N×K. In the deployable family scales are unset until ``calibrate``.

    Raises:
        InvalidArgumentError: an override names no layer.
        FailedPreconditionError: a layer cannot be quantized (padding other than zeros, input without channels).
    """
    quantization.check_layers(layer_names(model))
    student = copy.deepcopy(model)
    if quantization.deployable:
        _deployable(student, quantization, pixel_range)
    else:
        _simulated(student, quantization)
    student.graph.lint()
    student.recompile()
    student.eval()
    for module in student.modules():
        if isinstance(module, BATCH_NORM_TYPES):
            module.eval()
    return student.to(memory_format=torch.channels_last)  # what convolutions are fastest in


def _deployable(student: fx.GraphModule, quantization: Quantization, pixel_range: tuple[Tensor, Tensor] | None) -> None:
    moments = fold_batch_norms(student)
    placement = CodePlacement(student, pixel_range)
    found = list(layers(student))
    for node, layer in found:
        _check_layer(node, layer)
    bits_of = {n: quantization.bits(str(n.target), comes_from_image(student, input_of(n))) for n, _ in found}
    for node, layer in found:
        bits = bits_of[node]
        codes, quantizer = placement.codes_of(input_of(node), bits.activation)
        quantized: QuantizedLayer
        if isinstance(layer, nn.Conv2d):
            quantized = QuantizedConv2d(layer, quantizer, bits)
        else:
            quantized = QuantizedLinear(layer, quantizer, bits)
        quantized.moments = moments.get(node)
        set_module(student, str(node.target), quantized)
        node.args = (codes,)
    for node in list(student.graph.nodes):
        pool = module_of(student, node)
        if not isinstance(pool, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            continue
        codes, quantizer = placement.any_codes_of(input_of(node), POOL_BITS)
        whole = isinstance(pool, nn.AdaptiveAvgPool2d) and pool.output_size in (1, (1, 1))
        reader = CodesMean(quantizer) if whole else CodesPool(quantizer, pooling_windows(node, pool))
        set_module(student, str(node.target), reader)
        node.args = (codes,)
    placement.finish()


def _check_layer(node: fx.Node, layer: nn.Conv2d | nn.Linear) -> None:
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise FailedPreconditionError(
            f"layer {node.target} pads with {layer.padding_mode!r}; only zero padding can be quantized",
            reason="PADDING_MODE_UNSUPPORTED",
            field="model.artifact",
        )
    shape = tuple(input_of(node).meta["tensor_meta"].shape)
    if len(shape) != (4 if isinstance(layer, nn.Conv2d) else 2):
        raise FailedPreconditionError(
            f"layer {node.target} reads a tensor of shape N×{'×'.join(map(str, shape[1:]))}; a scale per channel needs "
            "N×C×H×W before a convolution and N×F before a linear layer, so networks with tokens (attention) are not "
            "supported",
            reason="LAYER_INPUT_UNSUPPORTED",
            field="model.artifact",
        )


class _SimulatedWeight(nn.Module):
    """Parametrization that fake-quantizes a weight by its own range at every use."""

    def __init__(self, bits: int, granularity: WeightGranularity) -> None:
        super().__init__()
        self.bits = bits
        self.granularity = granularity

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight, same shape."""
        return fake_quantize(weight, weight_dims(weight.dim(), self.granularity), self.bits)


class _SimulatedConv2d(nn.Module):
    """Convolution with a fake-quantized weight."""

    def __init__(self, conv: nn.Conv2d, quantize: _SimulatedWeight) -> None:
        super().__init__()
        self.weight, self.bias, self.quantize = conv.weight, conv.bias, quantize
        self._arguments: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        """Return the float output."""
        return F.conv2d(x, self.quantize(self.weight), self.bias, *self._arguments)


class _SimulatedLinear(nn.Module):
    """Linear layer with a fake-quantized weight."""

    def __init__(self, linear: nn.Linear, quantize: _SimulatedWeight) -> None:
        super().__init__()
        self.weight, self.bias, self.quantize = linear.weight, linear.bias, quantize

    def forward(self, x: Tensor) -> Tensor:
        """Return the float output."""
        return F.linear(x, self.quantize(self.weight), self.bias)


def _simulated(student: fx.GraphModule, quantization: Quantization) -> None:
    readers = {input_of(node): str(node.target) for node, _ in layers(student)}
    for node, layer in list(layers(student)):
        bits = quantization.bits(str(node.target))
        quantize = _SimulatedWeight(bits.weight, quantization.weight_granularity)
        simulated = (
            _SimulatedConv2d(layer, quantize) if isinstance(layer, nn.Conv2d) else _SimulatedLinear(layer, quantize)
        )
        set_module(student, str(node.target), simulated)
    for node in list(student.graph.nodes):
        activation = isinstance(module_of(student, node), (nn.ReLU, nn.ReLU6))
        if not activation and not (quantization.every_input and node in readers):
            continue
        reader = readers.get(node)
        bits_here = (
            quantization.bits(reader, reads_input=node.op == "placeholder").activation
            if reader
            else quantization.activation_bits
        )
        quantizer = DynamicActivation(bits_here, quantization.activation_granularity, channels_of(node))
        others = list(node.users)
        quantized = insert_module(student, node, node, f"fake_{node.name}", quantizer)
        for user in others:
            user.replace_input_with(node, quantized)


def stop_tracking(student: nn.Module) -> None:
    """Freeze the moving ranges of PER_TENSOR activations."""
    for module in student.modules():
        if isinstance(module, DynamicActivation):
            module.tracking = False


@contextmanager
def tracking_paused(student: nn.Module) -> Iterator[None]:
    """Keep moving ranges from following what the student is measured on, for the length of the block."""
    moving = [module for module in student.modules() if isinstance(module, DynamicActivation) and module.tracking]
    for module in moving:
        module.tracking = False
    try:
        yield
    finally:
        for module in moving:
            module.tracking = True


def trainable(student: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (weights, biases and affines; logarithms of scales), in a fixed order."""
    weights: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(True)
        (scales if name.endswith(("log_scale", "log_step")) else weights).append(parameter)
    return weights, scales


def no_grad_copy(model: fx.GraphModule) -> fx.GraphModule:
    """Return a copy in evaluation mode whose parameters need no gradient (a teacher)."""
    teacher = copy.deepcopy(model).eval()
    teacher.requires_grad_(False)
    return teacher.to(memory_format=torch.channels_last)


@torch.no_grad()
def simulated_logits(student: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    """Return the student's fake-quantized logits N×K of images N×C×H×W, in batches."""
    return torch.cat([student(part) for part in images.split(batch)])
