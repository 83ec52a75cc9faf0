"""Initial scales of a deployable student, from synthetic images: the clip of least mean squared error.

One forward pass in order of execution sets every scale from what reaches it, so that a layer's range already sees the
quantization of the layers before it. Training (``training.py``) then moves the scales by gradient.
"""

import math

import torch
from torch import Tensor, nn

from services.quantizer.learned import ActivationQuantizer, QuantizedLayer

RATIOS = 48  # candidate clips between MIN_RATIO and 1 times the largest magnitude, in geometric steps
MIN_RATIO = 0.1
SAMPLES = 16384  # values of a channel that the search looks at
DEAD_RATIO = 1e-2  # floor of a channel's scale, relative to the tensor's largest: a channel silent on synthetic images
ELEMENTS = 2**24  # of input that a calibration batch may hold, so that activations fit in memory


def best_scale(values: Tensor, lo: int, hi: int) -> Tensor:
    """Return for each row of ``values`` (R×M float) the scale whose codes in [lo, hi] err least in the mean square.

    A row of zeros gets scale 0; the caller decides on a floor.
    """
    largest = values.abs().amax(dim=1, keepdim=True) / hi
    best, least = largest.clone(), torch.full_like(largest, math.inf)
    safe = largest.clamp_min(torch.finfo(values.dtype).tiny)
    for ratio in torch.logspace(math.log10(MIN_RATIO), 0.0, RATIOS).tolist():
        scale = safe * ratio
        error = ((values / scale).round_().clamp_(lo, hi).mul_(scale).sub_(values)).square_().mean(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best)
    return torch.where(largest > 0, best, 0.0).squeeze(1)


def _with_floor(scale: Tensor) -> Tensor:
    largest = float(scale.max())
    return scale.clamp_min(DEAD_RATIO * largest if largest > 0 else 1.0)


def _set_activation_scale(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
    if not isinstance(quantizer, ActivationQuantizer):
        raise TypeError(type(quantizer).__name__)
    (x,) = args
    values = x.detach().transpose(0, 1).reshape(x.shape[1], -1)
    stride = max(1, values.shape[1] // SAMPLES)
    # A stride that shares no factor with the row length would be ideal; an odd one already visits all columns.
    values = values[:, :: stride | 1][:, :SAMPLES].float()
    scale = _with_floor(best_scale(values, quantizer.code_range.lo, quantizer.code_range.hi))
    quantizer.log_scale.data.copy_(scale.log())


def _set_weight_step(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    if not isinstance(layer, QuantizedLayer):
        raise TypeError(type(layer).__name__)
    step = best_scale(layer.folded_weight().detach().flatten(1), -layer.limit, layer.limit)
    layer.log_step.data.copy_(_with_floor(step).log())


@torch.no_grad()
def calibrate(student: nn.Module, images: Tensor) -> None:
    """Set all scales of a deployable student in place from images N×C×H×W float32 (N ≥ 1; the first 512 at most)."""
    count = max(1, min(len(images), 512, ELEMENTS // max(1, images[0].numel())))
    hooks = []
    for module in student.modules():
        if isinstance(module, ActivationQuantizer):
            hooks.append(module.register_forward_pre_hook(_set_activation_scale))
        elif isinstance(module, QuantizedLayer):
            hooks.append(module.register_forward_pre_hook(_set_weight_step))
    try:
        student(images[:count])
    finally:
        for hook in hooks:
            hook.remove()
