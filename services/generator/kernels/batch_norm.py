"""BatchNorm in training, scale and shift, and leaky ReLU, fused on a CPU (batch_norm.cpp)."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from services.common.kernels.loading import Signature, load

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_MOMENTS: Final[Signature] = ([_POINTER] * 3 + [_INT64] * 3 + [_INT], None)
_NORMALIZE: Final[Signature] = ([_POINTER] * 6 + [_INT64] * 4 + [_FLOAT, _INT], None)
_BACKWARD: Final[Signature] = ([_POINTER] * 7 + [_INT64] + [_POINTER] * 2 + [_INT64] * 3 + [_FLOAT, _INT], None)
_TYPES: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SIGNATURES: Final = {
    f"granq_{name}_{kind}": signature
    for kind in _TYPES.values()
    for name, signature in (("moments", _MOMENTS), ("normalize", _NORMALIZE), ("normalize_backward", _BACKWARD))
}


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where the installation has none or this machine cannot load them."""
    return load(Path(__file__).with_name("batch_norm.cpp"), _SIGNATURES)


def serves(x: Tensor) -> bool:
    """Whether ``normalized`` computes this: on a CPU, N×C×H×W in float32 or bfloat16, channels last."""
    return (
        x.device.type == "cpu"
        and x.dtype in _TYPES
        and x.dim() == 4
        and x.numel() > x.shape[1]
        and x.is_contiguous(memory_format=torch.channels_last)
        and library() is not None
    )


def normalized(x: Tensor, norm: nn.BatchNorm2d, scale: Tensor, shift: Tensor, slope: float) -> Tensor:
    """Return the leaky ReLU of scale·x̂ + shift, where x̂ is ``x`` normalized over the batch, where ``serves`` says so.

    Args:
        x: N×C×H×W.
        norm: Whose running statistics follow the batch's; its own affine is not looked at.
        scale: Float32 C, or N×C: of each sample.
        shift: Like ``scale``.
        slope: Of the leaky ReLU; 1: none.
    """
    outputs: tuple[Tensor, Tensor, Tensor] = _Normalized.apply(x, scale, shift, norm.eps, slope)
    _follow(norm, *outputs[1:], x.numel() // x.shape[1])
    return outputs[0]


@torch.no_grad()
def _follow(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked += 1
    weight = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, weight)
    norm.running_var.lerp_(variance * (count / (count - 1)), weight)


class _Normalized(torch.autograd.Function):
    """Keeps its input alone: the backward kernel works out anew what was normalized."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, slope: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        native: Any = library()
        kind = _TYPES[x.dtype]
        samples, channels, height, width = x.shape
        scale, shift = scale.contiguous(), shift.contiguous()
        mean, variance, y = torch.empty(channels), torch.empty(channels), torch.empty_like(x)
        sizes = samples, height * width, channels
        threads = torch.get_num_threads()
        getattr(native, f"granq_moments_{kind}")(x.data_ptr(), mean.data_ptr(), variance.data_ptr(), *sizes, threads)
        inverse = torch.rsqrt(variance + eps)
        pointers = [t.data_ptr() for t in (x, y, mean, inverse, scale, shift)]
        step = channels if scale.dim() == 2 else 0
        getattr(native, f"granq_normalize_{kind}")(*pointers, step, *sizes, slope, threads)
        ctx.save_for_backward(x, mean, inverse, scale, shift)
        ctx.slope = slope
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        native: Any = library()
        x, mean, inverse, scale, shift = ctx.saved_tensors
        samples, channels, height, width = x.shape
        g = grads[0].to(x.dtype).contiguous(memory_format=torch.channels_last)
        out, by_shift, by_scale = torch.empty_like(x), torch.empty(samples, channels), torch.empty(samples, channels)
        step = channels if scale.dim() == 2 else 0
        getattr(native, f"granq_normalize_backward_{_TYPES[x.dtype]}")(
            *(t.data_ptr() for t in (x, g, out, mean, inverse, scale, shift)),
            *(step, by_shift.data_ptr(), by_scale.data_ptr()),
            *(samples, height * width, channels, ctx.slope, torch.get_num_threads()),
        )
        if not step:
            by_shift, by_scale = by_shift.sum(0), by_scale.sum(0)
        return out, by_scale, by_shift, None, None
