"""The fused kernels of ``triton_kernels.py``; None or a refusal where they cannot serve.

Triton runs a kernel on the current GPU, so each launch makes that the tensors' own.
"""

from functools import cache
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from services.common.logs import get_logger
from services.quantizer.kernels import eager
from services.quantizer.kernels.layout import around_channels, dense, split_around

_TILE: Final = 2**15  # values that a program holds at once: 64 registers each of 512 threads
_BLOCK: Final = 2**11  # values of a program that takes them one by one
_GROUPS: Final = 16  # of a tile, where there is room: 64 bytes of memory, side by side in float32
_ROWS: Final = 2**9  # of a tile that is summed over
# Multiply and add stay two operations, each rounded as PyTorch's are: results equal the plain ones.
_EXACT: Final[dict[str, Any]] = {"enable_fp_fusion": False}

log = get_logger(__name__)


@cache
def kernels(device: torch.device) -> ModuleType | None:
    """Return the kernels, or None where they do not run on ``device`` as they should, which is logged.

    A compiler makes them for the device at hand, in the version that PyTorch brought. So they are tried against plain
    PyTorch before anything relies on them.
    """
    try:
        from services.quantizer.kernels import triton_kernels

        _try(triton_kernels, device)
    except Exception as error:  # whatever a compiler raises, plain PyTorch does the same work
        log.warning("fused GPU kernels are not used; plain PyTorch is slower", device=str(device), error=str(error))
        return None
    return triton_kernels


def _try(found: ModuleType, device: torch.device) -> None:
    """Raise RuntimeError where results are not those of plain PyTorch."""
    x = torch.randn(3, 37, 9, 9, generator=torch.Generator().manual_seed(0)).to(device)
    inverse = torch.linspace(0.5, 4, 37, device=device).view(1, -1, 1, 1)
    for values in (x, x.contiguous(memory_format=torch.channels_last)):
        for dims in ((2, 3), (0, 1, 2, 3)):
            made = _fake_quantize(found, values, dims, 4)
            if made is None or not bool(made[1]) or not torch.equal(made[0], eager.fake_quantize(values, dims, 4)[0]):
                raise RuntimeError(f"fake quantization over {dims} differs from plain PyTorch")
        codes_made, codes_wanted = _codes(found, values, inverse, 0, 15), eager.codes(values, inverse, 0, 15)
        if codes_made is None or not torch.equal(codes_made, codes_wanted):
            raise RuntimeError("codes differ from plain PyTorch")
        back = _codes_backward(found, codes_wanted, values, inverse, 0, 15)
        wanted = eager.codes_backward(codes_wanted, values, inverse, 0, 15)
        if back is None or not torch.equal(back[0], wanted[0]) or not torch.allclose(back[1], wanted[1], rtol=1e-3):
            raise RuntimeError("gradients of codes differ from plain PyTorch")


def fake_quantize(x: Tensor, dims: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor] | None:
    """Return what ``eager.fake_quantize`` does, or None where the kernel cannot serve."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or (found := kernels(x.device)) is None:
        return None
    return _fake_quantize(found, x, dims, bits)


def codes(v: Tensor, inverse: Tensor, lo: int, hi: int) -> Tensor | None:
    """Return what ``eager.codes`` does, or None where the kernel cannot serve."""
    return None if (found := kernels(v.device)) is None else _codes(found, v, inverse, lo, hi)


def codes_backward(grad: Tensor, v: Tensor, inverse: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor] | None:
    """Return what ``eager.codes_backward`` does, sums in another order, or None where the kernel cannot serve."""
    if grad.dtype is not torch.float32 or (found := kernels(v.device)) is None:
        return None
    return _codes_backward(found, grad, v, inverse, lo, hi)


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def _fake_quantize(found: ModuleType, x: Tensor, dims: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor] | None:
    x = dense(x)
    sizes = split_around(x, dims)
    if sizes is None:
        return None
    before, of, after = sizes
    y = torch.empty_like(x)
    rows = _power_of_two(of)
    if rows > _TILE:
        # A group is too long for one program: its range is found first, which reads the values once more.
        lo, hi = torch.aminmax(x.as_strided((before, of, after), (of * after, after, 1)), dim=1)
        lo, hi = lo.float(), hi.float()
        grid = (-(-x.numel() // _BLOCK),)
        with torch.cuda.device_of(x):
            found.round_to_grid[grid](x, y, lo, hi, x.numel(), of, after, bits=bits, size=_BLOCK, **_EXACT)
        return y, torch.isfinite(hi - lo).all()
    side_by_side = after > 1
    groups = min(_GROUPS if side_by_side else _TILE, _TILE // rows, _power_of_two(after if side_by_side else before))
    if not side_by_side:
        groups = min(groups, max(1, _BLOCK // rows))
    programs = before * -(-after // groups) if side_by_side else -(-before // groups)
    bad = torch.zeros((), dtype=torch.int32, device=x.device)
    warps = min(16, max(1, rows * groups // 1024))
    tile = {"side_by_side": side_by_side, "rows": rows, "across": groups, "num_warps": warps}
    with torch.cuda.device_of(x):
        found.fake_quantize_groups[(programs,)](x, y, bad, before, of, after, bits=bits, **tile, **_EXACT)
    return y, bad == 0


def _codes(found: ModuleType, v: Tensor, inverse: Tensor, lo: int, hi: int) -> Tensor | None:
    v, inverse = dense(v), inverse.contiguous()
    sizes = around_channels(v, inverse)
    if sizes is None:
        return None
    _, channels, after = sizes
    q = torch.empty_like(v)
    grid = (-(-v.numel() // _BLOCK),)
    with torch.cuda.device_of(v):
        found.codes[grid](v, inverse, q, v.numel(), channels, after, float(lo), float(hi), size=_BLOCK, **_EXACT)
    return q


def _codes_backward(
    found: ModuleType, grad: Tensor, v: Tensor, inverse: Tensor, lo: int, hi: int
) -> tuple[Tensor, Tensor] | None:
    v, inverse = dense(v), inverse.contiguous()
    sizes = around_channels(v, inverse)
    if sizes is None:
        return None
    grad = grad.contiguous() if v.is_contiguous() else grad.contiguous(memory_format=torch.channels_last)
    before, channels, after = sizes
    out = torch.empty_like(v)
    wide = after == 1
    across = min(_GROUPS, _power_of_two(channels)) if wide else 1
    chunks = max(1, -(-before * after // _ROWS))
    sums = torch.empty(chunks, channels, device=v.device)
    tile = {"rows": _ROWS, "across": across, "wide": wide}
    with torch.cuda.device_of(v):
        found.codes_backward[(chunks, -(-channels // across))](
            grad, v, inverse, out, sums, before, channels, after, float(lo), float(hi), **tile, **_EXACT
        )
    return out, sums.double().sum(0).float().view(inverse.shape)
