"""The quantizers' arithmetic, by the fastest means at hand: fused kernels, or plain PyTorch with the same results."""

import torch
from torch import Tensor

from services.quantizer.kernels import cpu, eager, gpu


def fake_quantize(x: Tensor, dims: tuple[int, ...], bits: int) -> Tensor:
    """Return ``x`` rounded to 2^bits levels between the minimum and maximum of each group, which spans ``dims``.

    Raises:
        ValueError: ``x`` is empty, or a group holds NaN or infinity or spans more than float32 can hold.
    """
    if x.numel() == 0:
        raise ValueError(f"cannot quantize an empty tensor of shape {tuple(x.shape)}")
    fused = gpu.fake_quantize(x, dims, bits) if x.is_cuda else cpu.fake_quantize(x, dims, bits)
    result, finite = eager.fake_quantize(x, dims, bits) if fused is None else fused
    if isinstance(finite, Tensor) and finite.is_cuda:
        torch._assert_async(finite, "cannot quantize NaN, infinity or a range beyond float32")
    elif not finite:
        raise ValueError("cannot quantize NaN, infinity or a range beyond float32")
    return result


def codes(v: Tensor, inverse: Tensor, lo: int, hi: int) -> Tensor:
    """Return clip(round(v·inverse), lo, hi), integer-valued; ``inverse`` differs along one axis of ``v`` at most."""
    fused = (gpu if v.is_cuda else cpu).codes(v, inverse, lo, hi)
    return eager.codes(v, inverse, lo, hi) if fused is None else fused


def codes_backward(grad: Tensor, v: Tensor, inverse: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``codes`` by ``v`` and by −ln ``inverse`` as LSQ defines them, shaped as these are."""
    fused = (gpu if v.is_cuda else cpu).codes_backward(grad, v, inverse, lo, hi)
    return eager.codes_backward(grad, v, inverse, lo, hi) if fused is None else fused
