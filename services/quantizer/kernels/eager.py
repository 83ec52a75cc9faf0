"""The arithmetic of the quantizers in plain PyTorch: what every fused kernel equals, and what runs where none does."""

import torch
from torch import Tensor

SPAN_FLOOR = 1e-8  # of the equations: keeps the scale of a constant group finite
OVERFLOW_RATIO = 1e-35  # span to magnitude below which scale·value would leave float32; only values above 1e27 meet it


def round_to_grid(x: Tensor, lo: Tensor, hi: Tensor, bits: int, clamp: bool) -> Tensor:
    """Return ``x`` on the grid of 2^bits levels between ``lo`` and ``hi``, which broadcast to it.

    Args:
        x: float32 or float64.
        lo: Minimum of each group.
        hi: Maximum of each group.
        bits: 2 to 8.
        clamp: Whether values may lie outside and are clipped.
    """
    span = (hi - lo).clamp_min(SPAN_FLOOR)
    span = torch.maximum(span, torch.maximum(lo.abs(), hi.abs()) * OVERFLOW_RATIO)
    scale = (2**bits - 1) / span
    zero_point = torch.round(scale * lo) + 2 ** (bits - 1)
    codes = (x * scale).sub_(zero_point).round_()
    if clamp:
        codes.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    result: Tensor = codes.add_(zero_point).div_(scale)
    return result


def fake_quantize(x: Tensor, dims: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor]:
    """Return ``x`` on the grid of each group's own range, and whether all ranges are finite, a scalar tensor.

    A group spans ``dims``. Narrow floats are computed in float32 and rounded once, at the end.
    """
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    lo, hi = wide.amin(dims, keepdim=True), wide.amax(dims, keepdim=True)
    return round_to_grid(wide, lo, hi, bits, clamp=False).to(x.dtype), torch.isfinite(hi - lo).all()


def codes(v: Tensor, inverse: Tensor, lo: int, hi: int) -> Tensor:
    """Return clip(round(v·inverse), lo, hi), integer-valued; ``inverse`` broadcasts to ``v``."""
    return (v * inverse).round_().clamp_(lo, hi)


def codes_backward(grad: Tensor, v: Tensor, inverse: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``codes`` by ``v`` and by −ln ``inverse`` as LSQ defines them, shaped as these are."""
    scaled = v * inverse
    clipped = scaled.clamp(lo, hi)
    inside = clipped == scaled
    error = torch.where(inside, scaled.round() - scaled, clipped)
    return (grad * inverse).mul_(inside), (grad * error).sum_to_size(inverse.shape)
