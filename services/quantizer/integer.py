"""The integer form of a deployable student: what is exported, and the reference that every export is held to.

Activations are integer codes, weights int8 codes, sums exact integers, each layer ends with one multiply per output
channel. float32 carries the integers: below 2^24 its sums are exact, so that order, batch size, threads and kernel do
not matter and two correct runtimes agree bit for bit. (Fake quantization on floats does not have this property: a last
bit decides a code at .5, and the flip spreads.)
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from services.quantizer.graph import input_of, module_of, set_module
from services.quantizer.learned import (
    ActivationQuantizer,
    CodeRange,
    CodesMean,
    Dequantize,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
)

EXACT_LIMIT = 2**24  # integers up to here are exact in float32


@torch.library.custom_op("granq::codes", mutates_args=())
def codes_op(x: Tensor, lo: int, hi: int) -> Tensor:
    """Round half to even and clip to [lo, hi]; an operator of its own so that the exporter can translate it."""
    return torch.round(x).clamp(lo, hi)


@codes_op.register_fake
def _(x: Tensor, lo: int, hi: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("granq::weight", mutates_args=())
def weight_op(codes: Tensor) -> Tensor:
    """Return int8 weight codes as float32."""
    return codes.float()


@weight_op.register_fake
def _(codes: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _per_channel(values: Tensor, rank: int) -> Tensor:
    return values.reshape(1, -1, *[1] * (rank - 2))


class Codes(nn.Module):
    """Float N×C×… → codes. ``inverse`` (C×…) multiplies first, unless the producer has it folded in."""

    inverse: Tensor | None

    def __init__(self, inverse: Tensor | None, code_range: CodeRange) -> None:
        super().__init__()
        self.register_buffer("inverse", inverse)
        self.code_range = code_range

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes, integer-valued float32."""
        if self.inverse is not None:
            x = x * self.inverse
        result: Tensor = torch.ops.granq.codes(x, self.code_range.lo, self.code_range.hi)
        return result


class Scale(nn.Module):
    """Multiplies by a constant per channel: codes → values."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        """Return x·factor."""
        return x * self.factor


class SumScale(nn.Module):
    """Global average pooling of codes N×C×H×W → N×C×1×1: an exact sum, then one multiply."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the scaled sum over H×W."""
        return codes.sum((2, 3), keepdim=True) * self.factor


class IntegerLayer(nn.Module):
    """Codes and multipliers of a convolution or linear layer.

    Attributes:
        codes: int8, shaped as the weight.
        bias: float32 O, integer-valued, in units of the accumulator.
        factor: float32 (1×)O(×1×1), what one unit of the accumulator is worth.
        bits: width of the weight codes, 2 to 8.
    """

    codes: Tensor
    bias: Tensor
    factor: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        step = torch.exp(layer.log_step.detach())
        self.register_buffer("codes", layer.weight_codes().detach().to(torch.int8))
        self.register_buffer("bias", torch.round(layer.bias.detach() / step))
        self.register_buffer("factor", step if isinstance(layer, QuantizedLinear) else step.view(1, -1, 1, 1))
        self.bits = layer.bits
        self.input_range = layer.quantizer.code_range

    @property
    def accumulator_bound(self) -> int:
        """Largest magnitude that the sum can reach for any input."""
        reach = max(-self.input_range.lo, self.input_range.hi)
        sums = self.codes.to(torch.int64).abs().flatten(1).sum(1) * reach + self.bias.to(torch.int64).abs()
        return int(sums.max())


class IntegerConv2d(IntegerLayer):
    """Convolution of codes N×I×H×W → float N×O×H'×W'."""

    def __init__(self, layer: QuantizedConv2d) -> None:
        super().__init__(layer)
        self.stride, self.padding, self.dilation, self.groups = (
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Return accumulator·factor."""
        weight = torch.ops.granq.weight(self.codes)
        sums = F.conv2d(codes, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return sums * self.factor


class IntegerLinear(IntegerLayer):
    """Linear layer of codes N×F → float N×O."""

    def forward(self, codes: Tensor) -> Tensor:
        """Return accumulator·factor."""
        return F.linear(codes, torch.ops.granq.weight(self.codes), self.bias) * self.factor


def to_integer(student: fx.GraphModule) -> fx.GraphModule:
    """Return the integer form of a calibrated deployable student; the student is left as it is.

    Scales are folded into the producing layer wherever nothing but ReLU, ReLU6 or a pooling by maximum lies between
    (they commute with a positive factor), and a ReLU whose only reader clips at zero anyway disappears.
    """
    result = copy.deepcopy(student)
    quantizers = {
        node: module
        for node in result.graph.nodes
        if isinstance(module := module_of(result, node), ActivationQuantizer)
    }
    for node in list(result.graph.nodes):
        module = module_of(result, node)
        if isinstance(module, QuantizedConv2d):
            set_module(result, str(node.target), IntegerConv2d(module))
        elif isinstance(module, QuantizedLinear):
            set_module(result, str(node.target), IntegerLinear(module))
        elif isinstance(module, Dequantize):
            set_module(result, str(node.target), Scale(_per_channel(module.quantizer.scale(), _rank(node))))
        elif isinstance(module, CodesMean):
            height, width = input_of(node).meta["tensor_meta"].shape[2:]
            factor = module.quantizer.scale() / (height * width)
            set_module(result, str(node.target), SumScale(_per_channel(factor, 4)))
    for node, quantizer in quantizers.items():
        inverse = torch.exp(-quantizer.bounded_log_scale().detach())
        folded = _fold_inverse(result, node, inverse)
        shaped = None if folded else _per_channel(inverse, _rank(node))
        set_module(result, str(node.target), Codes(shaped, quantizer.code_range))
        if not quantizer.code_range.signed:
            _drop_rectifiers(result, node)
    result.delete_all_unused_submodules()
    result.graph.lint()
    result.recompile()
    return result.requires_grad_(False)


def _rank(node: fx.Node) -> int:
    return len(node.meta["tensor_meta"].shape)


def _fold_inverse(model: fx.GraphModule, node: fx.Node, inverse: Tensor) -> bool:
    """Multiply the producer's factor by ``inverse`` if nothing but positively homogeneous operations lies between."""
    source = input_of(node)
    while len(source.users) == 1:
        module = module_of(model, source)
        if isinstance(module, (IntegerLayer, SumScale)):
            module.factor = module.factor * inverse.view(module.factor.shape)
            return True
        flat = isinstance(module, nn.Flatten) and input_of(source).meta["tensor_meta"].shape[2:].numel() == 1
        # ReLU6 counts: its ceiling is clipped by the codes (ActivationQuantizer.ceiling), and the module is dropped.
        if not flat and not isinstance(module, (nn.ReLU, nn.ReLU6, nn.MaxPool2d)):
            return False
        source = input_of(source)
    return False


def _drop_rectifiers(model: fx.GraphModule, node: fx.Node) -> None:
    """Remove ReLU and ReLU6 above ``node``, whose clip at zero (and at the ceiling) does the same."""
    source = input_of(node)
    while len(source.users) == 1:
        module = module_of(model, source)
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            above = input_of(source)
            source.replace_all_uses_with(above)
            model.graph.erase_node(source)
            source = above
        elif isinstance(module, nn.MaxPool2d):
            source = input_of(source)
        else:
            return


def integer_layers(model: fx.GraphModule) -> list[tuple[str, IntegerLayer, bool]]:
    """Return (name, layer, whether its input's codes come with the scale folded) in order of execution."""
    found = []
    for node in model.graph.nodes:
        module = module_of(model, node)
        if isinstance(module, IntegerLayer):
            codes = module_of(model, input_of(node))
            found.append((str(node.target), module, isinstance(codes, Codes) and codes.inverse is None))
    return found


def float_operations(model: fx.GraphModule) -> list[str]:
    """Return "name (kind)" of what computes in floating point: not codes, integer layers or plain rearrangement."""
    inside = (Codes, Scale, SumScale, IntegerLayer, nn.Flatten, nn.MaxPool2d, nn.Identity)
    found = []
    for node in model.graph.nodes:
        if node.op in ("call_function", "call_method"):
            found.append(f"{node.name} ({getattr(node.target, '__name__', node.target)})")
        elif node.op == "call_module" and not isinstance(module := module_of(model, node), inside):
            found.append(f"{node.target} ({type(module).__name__})")
    return found


def is_exact(model: fx.GraphModule) -> bool:
    """Whether no accumulator can leave the range in which float32 counts exactly."""
    return all(layer.accumulator_bound < EXACT_LIMIT for _, layer, _ in integer_layers(model))


def packed_bytes(model: fx.GraphModule) -> int:
    """Return the bytes of all weights at their own bit widths plus scales and biases in float32."""
    total = 0
    for _, layer, _ in integer_layers(model):
        total += int(np.ceil(layer.codes.numel() * layer.bits.weight / 8)) + 4 * (
            layer.bias.numel() + layer.factor.numel()
        )
    scales = [m.inverse for m in model.modules() if isinstance(m, Codes) and m.inverse is not None]
    factors = [m.factor for m in model.modules() if isinstance(m, (Scale, SumScale))]
    return total + sum(4 * t.numel() for t in (*scales, *factors))
