"""Modules of the integer form: codes, integer layers, and the float operations between them.

Each computes what the ONNX operators that it is exported to compute, operation by operation, so that results are equal
bit for bit wherever a runtime rounds as IEEE 754 says.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.quantizer.learned import CodeRange, QuantizedConv2d, QuantizedLayer, QuantizedLinear

EXACT_LIMIT = 2**24  # integers up to here are exact in float32
COARSER = 1e-3  # of a step's logarithm, beyond what the bound asks for: rounding may raise codes again


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


class Codes(nn.Module):
    """Float N×C×… → codes that are signed bytes.

    ``inverse`` (C×…) multiplies first, and the range's shift is taken off, unless the producer has it folded in.

    Attributes:
        code_range: Of the shifted codes.
        shift: What is taken off here.
    """

    inverse: Tensor | None

    def __init__(self, inverse: Tensor | None, code_range: CodeRange) -> None:
        super().__init__()
        self.register_buffer("inverse", inverse)
        self.shift = code_range.shift
        self.code_range = CodeRange(code_range.lo - self.shift, code_range.hi - self.shift)

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes, integer-valued float32."""
        if self.inverse is not None:
            x = x * self.inverse
        if self.shift:
            x = x - self.shift
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


class PoolScale(nn.Module):
    """Average pooling of codes over windows, then one multiply per channel."""

    factor: Tensor

    def __init__(self, pool: nn.Module, factor: Tensor) -> None:
        super().__init__()
        self.pool = pool
        self.register_buffer("factor", factor)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the scaled means."""
        pooled: Tensor = self.pool(codes)
        return pooled * self.factor


class Affine(nn.Module):
    """A BatchNorm that no layer could take in: x·factor + shift, both (1×)C(×1×1)."""

    factor: Tensor
    shift: Tensor

    def __init__(self, factor: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Return x·factor + shift, rounded twice."""
        return x * self.factor + self.shift


class Sigmoid(nn.Module):
    """The logistic function. Its last bits differ between runtimes: the one operation here that is not reproducible."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 1/(1 + e^−x)."""
        return torch.sigmoid(x)


class SiLU(nn.Module):
    """x times its logistic function, which is what ONNX makes of SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return x·sigmoid(x)."""
        gate: Tensor = self.gate(x)
        return x * gate


class Hardsigmoid(nn.Module):
    """Clips x/6 + 1/2 to [0, 1] in the steps that every runtime does alike; PyTorch's own kernel divides last."""

    def forward(self, x: Tensor) -> Tensor:
        """Return clip(x/6 + 1/2, 0, 1)."""
        return torch.clamp(x * (1 / 6) + 0.5, 0.0, 1.0)


class Hardswish(Hardsigmoid):
    """x times its Hardsigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x·hardsigmoid(x)."""
        return x * super().forward(x)


class IntegerLayer(nn.Module):
    """Codes and multipliers of a convolution or linear layer.

    Attributes:
        codes: int8, shaped as the weight.
        bias: float32 O, integer-valued, in units of the accumulator.
        factor: float32 (1×)O(×1×1), what one unit of the accumulator is worth.
        bits: width of the weight codes, 2 to 8.
        shift: what the codes that come in lack: −shift stands for the value 0.
    """

    codes: Tensor
    bias: Tensor
    factor: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.bits = layer.bits
        read = layer.quantizer.code_range
        self.shift = read.shift
        self.input_range = CodeRange(read.lo - self.shift, read.hi - self.shift)
        log_step = layer.log_step.detach()
        self._quantize(layer, log_step)
        # An output channel whose sums could leave the exact range gets a coarser step: rarely, with wide layers of
        # eight bits or biases far beyond the weights.
        while bool((over := self._bounds() >= EXACT_LIMIT).any()):
            excess = (self._bounds() / EXACT_LIMIT).to(log_step).log() + COARSER
            log_step = torch.where(over, log_step + excess, log_step)
            self._quantize(layer, log_step)

    def _quantize(self, layer: QuantizedLayer, log_step: Tensor) -> None:
        step = torch.exp(log_step)
        self.register_buffer("codes", layer.weight_codes(log_step).detach().to(torch.int8).contiguous())
        taken = self.shift * self.codes.flatten(1).sum(1)  # of the sums, by the shift of the codes
        self.register_buffer("bias", torch.round(layer.bias.detach() / step) + taken)
        self.register_buffer("factor", step if isinstance(layer, QuantizedLinear) else step.view(1, -1, 1, 1))

    def _bounds(self) -> Tensor:
        """Return for each output channel, O int64, the largest magnitude of any part of its sum, in any order."""
        codes = self.codes.to(torch.int64).flatten(1)
        above, below = codes.clamp_min(0).sum(1), -codes.clamp_max(0).sum(1)
        highest = above * self.input_range.hi - below * self.input_range.lo
        lowest = above * -self.input_range.lo + below * self.input_range.hi
        return torch.maximum(highest, lowest) + self.bias.to(torch.int64).abs()

    @property
    def accumulator_bound(self) -> int:
        """Largest magnitude that the sum can reach for any input."""
        return int(self._bounds().max())


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
