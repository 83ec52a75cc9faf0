"""Grids of weight codes: which integers a weight of few bits may be.

With zero among them and as many below as above it, b bits give 2^b − 1 codes: three of four, seven of eight.
There the codes are odd, −3 −1 1 3 at two bits and −7 to 7 at three: all of them, symmetric, evenly spaced, and integers
as any other to an engine. (Grids without zero at two bits: Liu et al. 2025, ParetoQ.)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ODD_UP_TO = 3  # bits; wider ones keep an exact zero, for one code of sixteen or more


@dataclass(frozen=True)
class WeightGrid:
    """Codes −limit, −limit + spacing, … limit.

    Attributes:
        limit: Largest code.
        spacing: Between neighbours: 1, or 2 where all codes are odd.
    """

    limit: int
    spacing: int

    @classmethod
    def of(cls, bits: int) -> "WeightGrid":
        """Return the grid of weights of so many bits, 2 to 8."""
        return cls(2**bits - 1, 2) if bits <= ODD_UP_TO else cls(2 ** (bits - 1) - 1, 1)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the code nearest to each value, which counts in units of code; float as x."""
        if self.spacing == 1:
            return x.round().clamp_(-self.limit, self.limit)
        return ((x - 1) / 2).round_().mul_(2).add_(1).clamp_(-self.limit, self.limit)


class _OddCodes(torch.autograd.Function):
    """Odd codes of ``w`` (O×…) at the value ``exp(log_step)`` (O×1…) of a unit, differentiable in both as LSQ defines.

    As in ``learned._Codes``, the reader multiplies by the step in effect: with c the code, v = w/t and g = ∂L/∂c,
    ∂L/∂w = g/t within the outermost codes and 0 beyond, ∂L/∂(ln t) = Σ g·(c − v) within and Σ g·c beyond.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, log_step: Tensor, limit: int) -> Tensor:
        inverse = torch.exp(-log_step)
        v = w * inverse
        codes = WeightGrid(limit, 2).nearest(v)
        ctx.save_for_backward(v, codes, inverse)
        ctx.limit = limit
        return codes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        v, codes, inverse = ctx.saved_tensors
        inside = v.abs() <= ctx.limit
        by_step = grads[0] * torch.where(inside, codes - v, codes)
        return grads[0] * inside * inverse, by_step.flatten(1).sum(1).view_as(inverse), None


def odd_codes(weight: Tensor, log_step: Tensor, limit: int) -> Tensor:
    """Return the odd codes of ``weight``, O×…, in ±limit, with LSQ's gradients; ``log_step`` (O×1…) is ln t."""
    codes: Tensor = _OddCodes.apply(weight, log_step, limit)
    return codes
