"""How tensors lie in memory, as far as the fused kernels need to know."""

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """Return ``x`` or a copy of it whose values lie without gaps, in the order N×C×H×W or N×H×W×C."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def _axes(x: Tensor) -> tuple[int, ...]:
    """Return the axes of a dense tensor from the outermost in memory to the innermost."""
    return tuple(range(x.dim())) if x.is_contiguous() else (0, 2, 3, 1)


def split_around(x: Tensor, dims: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Return the lengths (before, of, after) of ``dims`` in memory, or None where they do not lie together there."""
    axes = [axis for axis in _axes(x) if x.shape[axis] > 1]
    places = [place for place, axis in enumerate(axes) if axis in dims]
    begin, end = (places[0], places[-1] + 1) if places else (len(axes), len(axes))
    if len(places) != end - begin:
        return None
    before, of, after = axes[:begin], axes[begin:end], axes[end:]
    return tuple(torch.Size(x.shape[axis] for axis in part).numel() for part in (before, of, after))  # type: ignore[return-value]


def around_channels(v: Tensor, inverse: Tensor) -> tuple[int, int, int] | None:
    """Return ``v``'s lengths around the one axis along which ``inverse`` differs, or None."""
    if v.dtype is not torch.float32 or inverse.dtype is not torch.float32 or inverse.dim() != v.dim():
        return None
    along = [axis for axis, size in enumerate(inverse.shape) if size > 1]
    if len(along) > 1 or any(v.shape[axis] != inverse.shape[axis] for axis in along):
        return None
    return split_around(v, tuple(along))
