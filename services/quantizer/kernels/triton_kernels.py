"""The fused GPU kernels, in Triton. They do the operations of ``eager.py`` one by one and in its order.

Importing this module needs the package ``triton``, which comes with PyTorch's CUDA builds. Tensors are seen as (before,
groups or reduced, after) in memory, as ``layout.py`` splits them.

A tile is rows×across: rows of values, across groups. Where groups lie side by side (after > 1, channels-last), memory
runs across; where each lies by itself, it runs along the rows.
"""

import triton
import triton.language as tl

from services.quantizer.kernels import eager

_HALF_STEPS = tl.constexpr(8388608.0)  # 2^23: floats from here on are integers
_SPAN_FLOOR = tl.constexpr(eager.SPAN_FLOOR)
_OVERFLOW_RATIO = tl.constexpr(eager.OVERFLOW_RATIO)


@triton.jit
def _round(x):
    """Round to the nearest integer, half to even: adding 2^23 leaves no fraction."""
    up = (x + _HALF_STEPS) - _HALF_STEPS
    down = (x - _HALF_STEPS) + _HALF_STEPS
    return tl.where(tl.abs(x) < _HALF_STEPS, tl.where(x >= 0, up, down), x)


@triton.jit
def _scale_and_zero_point(lo, hi, bits: tl.constexpr):
    span = tl.maximum(hi - lo, _SPAN_FLOOR)
    span = tl.maximum(span, tl.maximum(tl.abs(lo), tl.abs(hi)) * _OVERFLOW_RATIO)
    scale = tl.math.div_rn(tl.zeros_like(span) + 1.0, span) * (2.0**bits - 1.0)  # as PyTorch divides a number
    return scale, _round(scale * lo) + 2.0 ** (bits - 1)


@triton.jit
def fake_quantize_groups(
    x,
    y,
    bad,
    groups,
    of,
    after,
    bits: tl.constexpr,
    side_by_side: tl.constexpr,
    rows: tl.constexpr,
    across: tl.constexpr,
):
    """Range and rounding of groups that fit into one tile: each value is read once and written once.

    ``bad`` is set to 1 where a group's range is not finite. The grid has a program for each ``across`` groups, which
    for groups side by side count within one index of ``before``.
    """
    if side_by_side:
        blocks = tl.cdiv(after, across)
        first = (tl.program_id(0) % blocks) * across
        base = (tl.program_id(0) // blocks).to(tl.int64) * of * after
        group = first + tl.arange(0, across)
        inside = group < after
        start, stride = base + group, after
    else:
        group = tl.program_id(0).to(tl.int64) * across + tl.arange(0, across)
        inside = group < groups
        start, stride = group * of, 1
    row = tl.arange(0, rows)
    place = start[None, :] + row[:, None] * stride
    there = (row < of)[:, None] & inside[None, :]
    values = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    lo = tl.min(tl.where(there, values, float("inf")), axis=0)
    hi = tl.max(tl.where(there, values, float("-inf")), axis=0)
    # A minimum passes over NaN, a sum does not.
    broken = tl.sum(tl.where(there & (values != values), 1, 0), axis=0) > 0
    broken = (broken | (tl.abs(hi - lo) == float("inf")) | (hi - lo != hi - lo)) & inside
    if tl.max(tl.where(broken, 1, 0), axis=0) > 0:
        tl.store(bad, 1)
    scale, zero = _scale_and_zero_point(tl.where(inside, lo, 0.0), tl.where(inside, hi, 0.0), bits)
    codes = _round(values * scale[None, :] - zero[None, :])
    result = tl.math.div_rn(codes + zero[None, :], tl.zeros_like(values) + scale[None, :])
    tl.store(y + place, result.to(y.dtype.element_ty), mask=there)


@triton.jit
def round_to_grid(x, y, lo, hi, count, of, after, bits: tl.constexpr, size: tl.constexpr):
    """Rounding by ranges that are known, one for each group, ``size`` values to a program."""
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    there = place < count
    group = place // (of * after) * after + place % after
    values = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    low, high = tl.load(lo + group, mask=there, other=0.0), tl.load(hi + group, mask=there, other=0.0)
    scale, zero = _scale_and_zero_point(low, high, bits)
    result = tl.math.div_rn(_round(values * scale - zero) + zero, scale)
    tl.store(y + place, result.to(y.dtype.element_ty), mask=there)


@triton.jit
def codes(v, inverse, q, count, channels, after, lo, hi, size: tl.constexpr):
    """Codes, ``size`` values to a program; NaN stays NaN."""
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    there = place < count
    scaled = tl.load(v + place, mask=there, other=0.0)
    scaled = scaled * tl.load(inverse + place // after % channels, mask=there, other=0.0)
    rounded = _round(scaled)
    clipped = tl.where(rounded < lo, lo, tl.where(rounded > hi, hi, rounded))
    tl.store(q + place, clipped, mask=there)


@triton.jit
def codes_backward(
    grad,
    v,
    inverse,
    out,
    sums,
    before,
    channels,
    after,
    lo,
    hi,
    rows: tl.constexpr,
    across: tl.constexpr,
    wide: tl.constexpr,
):
    """Gradients of ``codes``: by v, and sums of those by the logarithm of the scale.

    A program takes ``rows`` values of ``across`` channels. ``sums`` has a row of channels for each program along the
    first axis of the grid, which may be the longer one. ``wide``: whether channels lie side by side.
    """
    channel = tl.program_id(1) * across + tl.arange(0, across)
    index = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    if wide:
        place = index[:, None] * channels + channel[None, :]
    else:
        place = ((index // after) * channels * after + index % after)[:, None] + (channel * after)[None, :]
    known = channel < channels
    there = (index < before * after)[:, None] & known[None, :]
    step = tl.load(inverse + channel, mask=known, other=0.0)[None, :]
    upstream = tl.load(grad + place, mask=there, other=0.0)
    scaled = tl.load(v + place, mask=there, other=0.0) * step
    clipped = tl.where(scaled < lo, lo, tl.where(scaled > hi, hi, scaled))
    inside = clipped == scaled
    # A factor, as there: 0·NaN is NaN.
    tl.store(out + place, upstream * step * tl.where(inside, 1.0, 0.0), mask=there)
    error = tl.where(inside, _round(scaled) - scaled, clipped)
    total = tl.sum(tl.where(there, upstream * error, 0.0), axis=0)
    tl.store(sums + tl.program_id(0).to(tl.int64) * channels + channel, total, mask=known)
