"""The fused kernels of cpu.cpp, called through ctypes; None or a refusal where they cannot serve."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from services.common.kernels.loading import Signature, load
from services.quantizer.kernels.layout import around_channels, dense, split_around

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: Final[dict[str, Signature]] = {
    "granq_fake_quantize_float32": ([_POINTER] * 2 + [_INT64] * 3 + [_INT] * 2, _INT),
    "granq_fake_quantize_bfloat16": ([_POINTER] * 2 + [_INT64] * 3 + [_INT] * 2, _INT),
    "granq_codes": ([_POINTER] * 3 + [_INT64] * 3 + [_FLOAT] * 2 + [_INT], None),
    "granq_code_sums": ([_INT64] * 2, _INT64),
    "granq_codes_backward": ([_POINTER] * 5 + [_INT64] * 3 + [_FLOAT] * 2 + [_INT], None),
}


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where the installation has none or this machine cannot load them."""
    return load(Path(__file__).with_name("cpu.cpp"), _SIGNATURES)


def fake_quantize(x: Tensor, dims: tuple[int, ...], bits: int) -> tuple[Tensor, bool] | None:
    """Return what ``eager.fake_quantize`` does, or None where the kernel cannot serve."""
    native = library()
    if native is None or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    x = dense(x)
    split = split_around(x, dims)
    if split is None:
        return None
    y = torch.empty_like(x)
    kernel = native.granq_fake_quantize_float32 if x.dtype is torch.float32 else native.granq_fake_quantize_bfloat16
    return y, bool(kernel(x.data_ptr(), y.data_ptr(), *split, bits, torch.get_num_threads()))


def codes(v: Tensor, inverse: Tensor, lo: int, hi: int) -> Tensor | None:
    """Return what ``eager.codes`` does, or None where the kernel cannot serve."""
    native = library()
    if native is None:
        return None
    v, inverse = dense(v), inverse.contiguous()
    sizes = around_channels(v, inverse)
    if sizes is None:
        return None
    q = torch.empty_like(v)
    native.granq_codes(v.data_ptr(), inverse.data_ptr(), q.data_ptr(), *sizes, lo, hi, torch.get_num_threads())
    return q


def codes_backward(grad: Tensor, v: Tensor, inverse: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor] | None:
    """Return what ``eager.codes_backward`` does, sums in another order, or None where the kernel cannot serve."""
    native = library()
    if native is None or grad.dtype is not torch.float32:
        return None
    v, inverse = dense(v), inverse.contiguous()
    sizes = around_channels(v, inverse)
    if sizes is None:
        return None
    grad = grad.contiguous() if v.is_contiguous() else grad.contiguous(memory_format=torch.channels_last)
    outer, channels, inner = sizes
    out = torch.empty_like(v)
    sums = torch.empty(native.granq_code_sums(outer, inner), channels, dtype=torch.float64)
    native.granq_codes_backward(
        *(tensor.data_ptr() for tensor in (grad, v, inverse, out, sums)), *sizes, lo, hi, torch.get_num_threads()
    )
    return out, sums.sum(0).float().view(inverse.shape)
