"""Static quantizers with learned scales: the form of GranQ's channel-wise scaling that an integer engine runs.

A scale per *sample* and channel cannot leave an integer sum. A static scale s[c] per channel can, because it moves
into the weights: Σ W[o,c]·s[c]·q[c] = Σ W'[o,c]·q[c] with W' = W·s. So activations travel as integer codes q, and the
layer that reads them quantizes W' per output channel, symmetric, with step t[o]:

    codes   q = clip(round(x / s[c]), lo, hi)                      activation, straight-through gradient
    weight  p = clip(round(W[o,c]·s[c] / t[o]), −m, m)             m = 2^(b−1) − 1; below four bits see ``grids.py``
    output  y = t[o] · (Σ p·q + round(bias[o] / t[o]))             an exact integer sum and one multiply

Both steps are learned (LSQ, Esser et al. 2020). Scales are stored as logarithms: they stay positive, and a step of the
optimizer is relative, so that channels of very different range learn at the same pace.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.quantizer import kernels
from services.quantizer.config import LayerBits
from services.quantizer.grids import WeightGrid, odd_codes
from services.quantizer.moments import Moments


@dataclass(frozen=True)
class CodeRange:
    """Integers that an activation's codes may take, ends included; code 0 is the value 0.

    Engines carry signed bytes. The 256 codes of another range are signed bytes less a constant, the ``shift`` z. As
    Σ p·q = Σ p·(q − z) + z·Σ p, the bias of the reader takes z back exactly; only the integer form (``integer.py``)
    knows of it.
    """

    lo: int
    hi: int

    @classmethod
    def of(cls, bits: int, signed: bool) -> "CodeRange":
        """Return the range that engines with signed 8-bit containers run without a shift.

        Unsigned codes end at 127, so 8 bits after a ReLU are seven. Signed 8-bit codes use −128, because the
        QuantizeLinear operator saturates there; fewer bits are symmetric.
        """
        if not signed:
            return cls(0, min(2**bits - 1, 127))
        return cls(-128, 127) if bits == 8 else cls(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)

    @property
    def shift(self) -> int:
        """What is taken off 256 codes so that they are signed bytes; 0 of fewer codes."""
        return self.hi - 127 if self.hi - self.lo == 255 else 0

    @property
    def signed(self) -> bool:
        """Whether negative codes exist."""
        return self.lo < 0


class _Codes(torch.autograd.Function):
    """Codes of ``v`` at step ``s``, differentiable in both as LSQ defines.

    The result is q = clip(round(v/s)), an integer-valued float. Whoever reads q multiplies by s in effect (it sits in
    the weights), so with g = ∂L/∂q: ∂L/∂v = g/s inside the range and 0 outside; ∂L/∂(s as LSQ means it) =
    Σ (g/s)·(q − v/s) inside and Σ (g/s)·q outside, and ∂L/∂(ln s) is that times s.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, log_scale: Tensor, lo: int, hi: int) -> Tensor:
        inverse = torch.exp(-log_scale)
        ctx.save_for_backward(v, inverse)
        ctx.range = (lo, hi)
        return kernels.codes(v, inverse, lo, hi)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        v, inverse = ctx.saved_tensors
        return *kernels.codes_backward(grads[0], v, inverse, *ctx.range), None, None


class _RoundThrough(torch.autograd.Function):
    """Round half to even; the gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class CodeSource(Protocol):
    """Where codes come from, as far as their readers need to know."""

    @property
    def code_range(self) -> CodeRange:
        """Codes that may occur."""

    @property
    def bits(self) -> int:
        """Width of the codes."""

    def scale(self) -> Tensor:
        """Return what one unit of each channel's codes is worth, C, without a gradient."""

    def gather(self, values: Callable[["ActivationQuantizer"], Tensor]) -> Tensor:
        """Return, for each channel of the codes, C, the value that ``values`` has for the channel it was made in."""


class ActivationQuantizer(nn.Module):
    """Float activation N×C×H×W (or N×F) → integer-valued codes of the same shape; one learned scale per channel.

    ``ceiling`` is the largest value that the float activation can take (6 after a ReLU6) or None. The scale is kept at
    or below ceiling/hi, so that clipping the codes also does the clipping of the activation. ``reach`` is the magnitude
    (C) that calibration has to cover, whatever its images show, or None. ``step`` is the scale (C) where it is known:
    then it is neither calibrated nor learned.
    """

    log_scale: Tensor

    def __init__(
        self,
        channels: int,
        code_range: CodeRange,
        bits: int,
        ceiling: float | None = None,
        reach: Tensor | None = None,
        step: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.reach = reach
        self.code_range = code_range
        self.bits = bits
        self.ceiling = ceiling
        if step is None:
            self.log_scale = nn.Parameter(torch.zeros(channels))
        else:
            self.register_buffer("log_scale", step.log())

    @property
    def learns(self) -> bool:
        """Whether the scale is learned."""
        return isinstance(self.log_scale, nn.Parameter)

    def bounded_log_scale(self) -> Tensor:
        """Return ln s, C, at most ln(ceiling/hi)."""
        if self.ceiling is None:
            return self.log_scale
        limit = torch.log(torch.tensor(self.ceiling / self.code_range.hi, device=self.log_scale.device))
        return torch.minimum(self.log_scale, limit)

    def scale(self) -> Tensor:
        """Return s, C, without a gradient: the readers' share of it is in ``_Codes``."""
        return torch.exp(self.bounded_log_scale().detach())

    def gather(self, values: Callable[["ActivationQuantizer"], Tensor]) -> Tensor:
        """Return the value of each channel, C: these codes are made here."""
        return values(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes."""
        log_scale = self.bounded_log_scale().view(1, -1, *[1] * (x.dim() - 2))
        result: Tensor = _Codes.apply(x, log_scale, self.code_range.lo, self.code_range.hi)
        return result

    def extra_repr(self) -> str:
        """Say channels, bits and range."""
        return f"channels={self.log_scale.numel()}, bits={self.bits}, codes={self.code_range.lo}..{self.code_range.hi}"


class QuantizedLayer(nn.Module, ABC):
    """What a quantized convolution and a quantized linear layer share: weight, bias, weight step, bits.

    ``moments`` are those of its output over the training data, where it took in a BatchNorm; calibration looks at them.
    """

    def __init__(self, weight: Tensor, bias: Tensor, quantizer: CodeSource, bits: LayerBits) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.log_step = nn.Parameter(torch.zeros(weight.shape[0]))
        self.bits = bits
        self.moments: Moments | None = None
        # A plain reference: the quantizer's parameters belong to its own place in the graph.
        self._quantizer = (quantizer,)

    @property
    def quantizer(self) -> CodeSource:
        """Where the codes that come in are made."""
        return self._quantizer[0]

    @property
    def grid(self) -> WeightGrid:
        """Codes that a weight may have."""
        return WeightGrid.of(self.bits.weight)

    @abstractmethod
    def by_input(self, values: Tensor) -> Tensor:
        """Return a value for each channel of the layer's input, C, laid out to multiply the weight."""

    @abstractmethod
    def transform(self, codes: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return what the layer makes of codes with another weight, shaped as its own, and another bias, O."""

    def forward(self, codes: Tensor) -> Tensor:
        """Return the float output."""
        return self.transform(codes, *self.quantized_weight_and_bias())

    def input_scale(self) -> Tensor:
        """Return s of the layer's input laid out to multiply the weight."""
        return self.by_input(self.quantizer.scale())

    def folded_weight(self) -> Tensor:
        """Return W' = W·s, shaped as the weight: what is quantized."""
        return self.weight * self.input_scale()

    def weight_codes(self, log_step: Tensor | None = None) -> Tensor:
        """Return the integer-valued codes p of W', shaped as the weight, at the learned or the given ln t (O)."""
        log_step = self.log_step if log_step is None else log_step
        log_step = log_step.view(-1, *[1] * (self.weight.dim() - 1))
        grid, weight = self.grid, self.folded_weight()
        if grid.spacing == 2:
            return odd_codes(weight, log_step, grid.limit)
        codes: Tensor = _Codes.apply(weight, log_step, -grid.limit, grid.limit)
        return codes

    def quantized_weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """Return p·t, shaped as the weight, and the bias on the accumulator's grid, O."""
        step = torch.exp(self.log_step.detach())
        weight = self.weight_codes() * step.view(-1, *[1] * (self.weight.dim() - 1))
        bias: Tensor = _RoundThrough.apply(self.bias / step) * step
        return weight, bias

    def extra_repr(self) -> str:
        """Say shape and bits."""
        return f"{tuple(self.weight.shape)}, W{self.bits.weight}A{self.bits.activation}"


class QuantizedConv2d(QuantizedLayer):
    """Convolution of codes N×I×H×W → float N×O×H'×W'; zero padding only (code 0 is the value 0)."""

    def __init__(self, conv: nn.Conv2d, quantizer: CodeSource, bits: LayerBits) -> None:
        bias = conv.bias.detach().clone() if conv.bias is not None else torch.zeros(conv.out_channels)
        super().__init__(conv.weight.detach().clone(), bias.to(conv.weight.device), quantizer, bits)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def by_input(self, values: Tensor) -> Tensor:
        """Return the value of channel c for each (o, i) of the weight, O×I/groups×1×1."""
        outputs, inputs = self.weight.shape[:2]
        laid = values.view(self.groups, 1, inputs)
        return laid.expand(self.groups, outputs // self.groups, inputs).reshape(outputs, inputs, 1, 1)

    def transform(self, codes: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the float convolution."""
        return F.conv2d(codes, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class QuantizedLinear(QuantizedLayer):
    """Linear layer of codes N×F → float N×O."""

    def __init__(self, linear: nn.Linear, quantizer: CodeSource, bits: LayerBits) -> None:
        bias = linear.bias.detach().clone() if linear.bias is not None else torch.zeros(linear.out_features)
        super().__init__(linear.weight.detach().clone(), bias.to(linear.weight.device), quantizer, bits)

    def by_input(self, values: Tensor) -> Tensor:
        """Return the values as a row, 1×F."""
        return values.view(1, -1)

    def transform(self, codes: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the float product."""
        return F.linear(codes, weight, bias)
