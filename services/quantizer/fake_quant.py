"""Dynamic asymmetric fake quantization: the simulation that the GranQ paper trains and reports (arXiv 2503.18339).

A group of values shares one range. For activations of shape N×C×H×W (or N×F) the groups are

    PER_TENSOR           all values                       ranges 1
    PER_SAMPLE_CHANNEL   x[n, c] over H×W (or row x[n])   ranges N×C×1×1 (or N×1)
    PER_CHANNEL          x[:, c]                          ranges 1×C×1×1 (or 1×C); for comparisons only

and for weights O×I×k×k (or O×F)

    PER_OUTPUT_CHANNEL   w[o]                             ranges O×1×1×1
    PER_KERNEL           w[o, i] (a linear row as a whole) ranges O×I×1×1

All groups are done at once, by one fused kernel where the installation has it (``kernels``); nothing loops over
channels. No integer engine can run PER_SAMPLE_CHANNEL or PER_KERNEL: they are here to reproduce published figures.
``learned.py`` has the form that an engine runs.

Example, one group at 2 bits: x = (0, 1, 2, 3) has lo = 0, hi = 3, scale S = 3/3 = 1, zero point Z = 0 + 2, codes
round(x − 2) = (−2, −1, 0, 1), and (q + Z)/S gives x back exactly.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from services.quantizer import kernels
from services.quantizer.config import ActivationGranularity, WeightGranularity
from services.quantizer.kernels.eager import round_to_grid


def group_range(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum of ``x`` over ``dims``, kept as axes of length 1.

    Raises:
        ValueError: a group is empty, holds NaN or infinity, or spans more than float32 can hold.
    """
    if x.numel() == 0:
        raise ValueError(f"cannot quantize an empty tensor of shape {tuple(x.shape)}")
    lo, hi = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    finite = torch.isfinite(hi - lo).all()
    if x.is_cuda:
        torch._assert_async(finite, "cannot quantize NaN, infinity or a range beyond float32")
    elif not finite:
        raise ValueError("cannot quantize NaN, infinity or a range beyond float32")
    return lo, hi


class _FakeQuantize(torch.autograd.Function):
    """Round to the grid of each group's own range; the gradient passes straight through, so ranges get none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], bits: int) -> Tensor:
        return kernels.fake_quantize(x, dims, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class _RoundToGrid(torch.autograd.Function):
    """Round to the grid of given ranges and clip; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
        return round_to_grid(x, lo, hi, bits, clamp=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


def fake_quantize(x: Tensor, dims: tuple[int, ...], bits: int) -> Tensor:
    """Return ``x`` rounded to 2^bits levels between the minimum and maximum of each group.

    Args:
        x: Float tensor of any shape.
        dims: Axes that a group spans; the other axes index the groups.
        bits: 2 to 8.

    Returns:
        Tensor like ``x``. Rounding is half to even; the gradient is the identity.

    Raises:
        ValueError: as ``group_range``.
    """
    result: Tensor = _FakeQuantize.apply(x, dims, bits)
    return result


def activation_dims(rank: int, granularity: ActivationGranularity) -> tuple[int, ...]:
    """Return the axes that one range spans in an activation of ``rank`` 2 (N×F) or more (N×C×…)."""
    if granularity is ActivationGranularity.PER_TENSOR:
        return tuple(range(rank))
    if granularity is ActivationGranularity.PER_SAMPLE_CHANNEL:
        return (1,) if rank == 2 else tuple(range(2, rank))
    return (0, *range(2, rank))


def weight_dims(rank: int, granularity: WeightGranularity) -> tuple[int, ...]:
    """Return the axes that one range spans in a weight of ``rank`` 2 (O×F) or 4 (O×I×k×k)."""
    if granularity is WeightGranularity.PER_KERNEL and rank > 2:
        return tuple(range(2, rank))
    return tuple(range(1, rank))


def _alone(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    return lo, hi


class DynamicActivation(nn.Module):
    """Fake quantization of an activation by the range of the tensor at hand, N×C×H×W or N×F, same shape out.

    PER_TENSOR follows the earlier methods that GranQ compares with: while ``tracking`` is set, an exponential moving
    average of minimum and maximum (β = 0.9, bias-corrected) is kept and used; later it stays as it is, and values
    outside are clipped. PER_CHANNEL does the same with a range for each of the ``channels``. PER_SAMPLE_CHANNEL is
    always dynamic.
    """

    BETA = 0.9
    lo: Tensor
    hi: Tensor
    steps: Tensor

    def __init__(self, bits: int, granularity: ActivationGranularity, channels: int = 1) -> None:
        super().__init__()
        self.bits = bits
        self.granularity = granularity
        self.tracking = True
        self.agree: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _alone  # where others see parts of the batch
        shape = (channels,) if granularity is ActivationGranularity.PER_CHANNEL else ()
        self.register_buffer("lo", torch.zeros(shape))
        self.register_buffer("hi", torch.zeros(shape))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized activation."""
        dims = activation_dims(x.dim(), self.granularity)
        if self.granularity is ActivationGranularity.PER_SAMPLE_CHANNEL:
            return fake_quantize(x, dims, self.bits)
        if self.tracking:
            lo, hi = self.agree(*group_range(x.detach(), dims))
            self.lo.mul_(self.BETA).add_(lo.view(self.lo.shape), alpha=1 - self.BETA)
            self.hi.mul_(self.BETA).add_(hi.view(self.hi.shape), alpha=1 - self.BETA)
            self.steps += 1
        if not self.steps:
            raise RuntimeError(
                f"the range of a {self.granularity.name} activation was never tracked; run a batch with tracking set"
            )
        correction = 1 - self.BETA**self.steps
        lo, hi = (self._spread(range_ / correction, x.dim()) for range_ in (self.lo, self.hi))
        result: Tensor = _RoundToGrid.apply(x, lo, hi, self.bits)
        return result

    @staticmethod
    def _spread(range_: Tensor, rank: int) -> Tensor:
        return range_.view(1, -1, *[1] * (rank - 2)) if range_.dim() else range_

    def extra_repr(self) -> str:
        """Say bits and granularity."""
        return f"bits={self.bits}, granularity={self.granularity.name}"
