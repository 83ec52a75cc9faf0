"""BatchNorm with frozen statistics, a shortcut's addition, ReLU and fake quantization, fused on a CPU (norms.cpp)."""

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from services.common.kernels.loading import Signature, load

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class _Branch(ctypes.Structure):
    _fields_ = tuple(
        (name, _POINTER)
        for name in (
            *("x", "inverse", "mean", "weight", "bias", "batch_mean", "batch_variance"),
            *("by_batch_mean", "by_batch_variance", "gradient"),
        )
    )


_BRANCHES: Final[list[Any]] = [ctypes.POINTER(_Branch)] * 2
_FORWARD: Final[Signature] = ([*_BRANCHES, *[_POINTER] * 2, *[_INT64] * 3, _FLOAT, _INT, _INT], _INT)
_BACKWARD: Final[Signature] = ([*_BRANCHES, *[_POINTER] * 3, *[_INT64] * 2, _FLOAT, _INT], None)
_SIGNATURES: Final[dict[str, Signature]] = {
    "granq_norms_serve": ([], _INT),
    "granq_norms_forward_float32": _FORWARD,
    "granq_norms_forward_bfloat16": _FORWARD,
    "granq_norms_backward_float32": _BACKWARD,
    "granq_norms_backward_bfloat16": _BACKWARD,
}


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where there are none or the processor has no fused multiply-add."""
    found = load(Path(__file__).with_name("norms.cpp"), _SIGNATURES)
    return found if found is not None and found.granq_norms_serve() else None


@dataclass(frozen=True)
class Activation:
    """What follows the sum.

    Attributes:
        cap: 6 of a ReLU6, infinity of a ReLU.
        bits: Of the fake quantization by the range of each sample and channel, 2 to 8; 0: none, and the statistics of
            what the BatchNorm layers read are worked out instead.
    """

    cap: float = math.inf
    bits: int = 0


def serves(x: Tensor, norms: list[nn.BatchNorm2d], shortcut: Tensor | None) -> bool:
    """Whether ``fused`` computes this: on a CPU, N×C×H×W in float32 or bfloat16, channels last, BatchNorm frozen."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and (
            shortcut is None
            or (
                shortcut.shape == x.shape
                and shortcut.dtype is x.dtype
                and shortcut.is_contiguous(memory_format=torch.channels_last)
            )
        )
        and all(
            not norm.training
            and norm.running_mean is not None
            and norm.weight is not None
            and norm.weight.dtype is torch.float32
            for norm in norms
        )
        and library() is not None
    )


def fused(
    x: Tensor, norms: list[nn.BatchNorm2d], shortcut: Tensor | None, activation: Activation, copies: int
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return activation(norms[0](x) [+ norms[1](shortcut) or shortcut]), where ``serves`` says so.

    Args:
        x: N×C×H×W.
        norms: Of ``x``, and of the shortcut where it has one.
        shortcut: Like ``x``, or None.
        activation: What follows.
        copies: 1, or 2 to get the result twice, in the same memory. Then the gradients of two readers are added where
            they are used.

    Returns:
        The result, ``copies`` times, and without bits the mean and the biased variance over the batch, C each, of what
        each of ``norms`` read. All are differentiable; the gradient passes a quantization straight through.

    Raises:
        ValueError: something to quantize is NaN or infinite.
    """
    affines: list[Tensor | None] = []
    for norm in norms:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("a BatchNorm has no running statistics")
        affines += [torch.rsqrt(norm.running_var + norm.eps), norm.running_mean, norm.weight, norm.bias]
    affines += [None] * (8 - len(affines))
    outputs = _Fused.apply(x, shortcut, activation, copies, *affines)
    statistics = outputs[copies:]
    return list(outputs[:copies]), list(zip(statistics[::2], statistics[1::2], strict=True))


def _at(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


class _Fused(torch.autograd.Function):
    """Keeps the inputs alone: the backward kernel works out anew what passed the ReLU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor | None, activation: Activation, copies: int, *affines: Tensor | None
    ) -> tuple[Tensor, ...]:
        native: Any = library()
        samples, channels, height, width = x.shape
        y = torch.empty_like(x)
        origins = torch.empty(2, channels)
        moments: list[Tensor] = []
        if not activation.bits:
            moments = [torch.empty(channels) for _ in range(4 if affines[4] is not None else 2)]
        places = moments + [None] * (4 - len(moments))
        one = _Branch(*_at(x, *affines[:4], *places[:2]))
        two = _Branch(*_at(s, *affines[4:], *places[2:]))
        function = (
            native.granq_norms_forward_float32 if x.dtype is torch.float32 else native.granq_norms_forward_bfloat16
        )
        finite = function(
            *(one, two, y.data_ptr(), origins.data_ptr(), samples, height * width, channels),
            *(activation.cap, activation.bits, torch.get_num_threads()),
        )
        if not finite:
            raise ValueError("cannot quantize NaN, infinity or a range beyond float32")
        ctx.save_for_backward(x, s, *affines, *moments[::2])
        ctx.activation, ctx.copies = activation, copies
        ctx.set_materialize_grads(False)
        return y, *(y.detach() for _ in range(copies - 1)), *moments

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        native: Any = library()
        x, s, *rest = ctx.saved_tensors
        affines, means = rest[:8], rest[8:]
        channels = x.shape[1]
        rows = x.numel() // channels
        given = [_like(grad, x) for grad in grads[: ctx.copies] if grad is not None]
        if not given:
            given = [torch.zeros_like(x)]
        by_moments = [torch.zeros(channels) if grad is None else grad.contiguous() for grad in grads[ctx.copies :]]
        by_x, by_s = torch.empty_like(x), None if s is None else torch.empty_like(s)
        sums = torch.empty(3, channels) if any(ctx.needs_input_grad[4:]) else None

        def branch(index: int, tensor: Tensor | None, gradient: Tensor | None) -> _Branch:
            frozen = _at(*affines[4 * index : 4 * index + 4])
            moments: list[int | None] = [None] * 4
            if len(means) > index:
                by_mean, by_variance = by_moments[2 * index : 2 * index + 2]
                moments = [means[index].data_ptr(), None, by_mean.data_ptr(), by_variance.data_ptr()]
            return _Branch(*_at(tensor), *frozen, *moments, *_at(gradient))

        function = (
            native.granq_norms_backward_float32 if x.dtype is torch.float32 else native.granq_norms_backward_bfloat16
        )
        function(
            *(branch(0, x, by_x), branch(1, s, by_s), *_at(given[0], given[1] if len(given) > 1 else None)),
            *(*_at(sums), rows, channels, ctx.activation.cap, torch.get_num_threads()),
        )
        by_bias, by_weight, by_second = (None, None, None) if sums is None else sums
        second = (by_second, by_bias) if affines[4] is not None else (None, None)
        return by_x, by_s, None, None, None, None, by_weight, by_bias, None, None, *second


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """Return a gradient in the type and layout that the kernel reads."""
    if gradient.dtype is x.dtype and gradient.is_contiguous(memory_format=torch.channels_last):
        return gradient
    return gradient.to(x.dtype).contiguous(memory_format=torch.channels_last)
