"""Initial scales of a deployable student, from synthetic images.

One forward pass in order of execution sets every scale from what reaches it, so that a layer's range already sees the
quantization of the layers before it. Training (``training.py``) then moves the scales by gradient.

While it runs, the output of every BatchNorm, and of every layer that took one in, is brought to the moments that it has
on real data (``moments.py``). An activation starts at a margin above the clip of least mean squared error: the shape of
a distribution is still that of synthetic images, whose tails are lighter. Seven bits and more cover the whole range.
The image covers black and white, or three standard deviations where these are not known, and else no more than is seen:
a white pixel of real data often lies beyond the generator's extremes.

Weights are rounded so that the errors of one output make up for each other (``rounding.py``). Those of eight bits reach
their largest magnitude; of fewer bits, each output channel gets the clip with which its output errs least. A channel of
eight-bit input whose folded weights are large beside others rules the steps of all, while its own codes are finer than
need be of others. So where weights have far fewer bits than codes, part of this ratio moves from the weights to the
codes (equalization, Nagel et al. 2019, between a layer's weights and its input). Rounding also shifts a
layer's output: that of weights where the input has a mean, as it has behind a ReLU, and that of the input itself where
clipped tails, or values below half a step, are not made up for. The bias takes both back (Nagel et al. 2019).

Clipping makes outputs smaller, too, layer upon layer, which ranges set under BatchNorm's moments do not foresee. So an
output channel's step is stretched until the output changes as much as the unrounded one, on which it then has slope 1.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from services.quantizer.graph import BATCH_NORM_TYPES
from services.quantizer.grids import WeightGrid
from services.quantizer.learned import ActivationQuantizer, CodeSource, QuantizedConv2d, QuantizedLayer
from services.quantizer.moments import Moments
from services.quantizer.placement import WHOLE_RANGE_BITS
from services.quantizer.rounding import LARGEST, settle_weights

CLIP_BELOW_BITS = 8  # of weights: see above
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the largest magnitude of an output channel's weights
SPARE_BITS = 3  # that codes have more than the weights that read them, for some to be given away
EQUALIZED = 0.5  # exponent of the ratio between channels that moves into the codes
COARSEST = 4.0  # times its own, that a channel's scale may become: two bits
MARGIN = 1.3  # of an activation's range above the clip that suits synthetic images
SAMPLES = 2**15  # of a channel, that its clip is found from
RATIOS = 48  # candidate clips between MIN_RATIO and 1 times the largest magnitude, in geometric steps
MIN_RATIO = 0.1
DEAD_RATIO = 1e-2  # floor of a channel's scale, relative to the tensor's largest: a channel silent on synthetic images
NO_STEP = 2.0**-20  # of a row of zeros, and no larger, because a grid without zero makes codes of it
STRETCH = 0.5, 2.0  # of a step for the slope's sake, at most: of an output that is all but noise, the slope is noise
BIAS_CODES = 2**22  # largest code of a bias: leaves the accumulator, exact below 2^24, room for the sum
ELEMENTS = 2**24  # of input that a calibration batch may hold, so that activations fit in memory


def best_step(values: Tensor, grid: WeightGrid) -> Tensor:
    """Return for each row of ``values`` (R×M float) the step whose codes err least in the mean square.

    A row of zeros gets step 0; the caller decides on a floor.
    """
    largest = values.abs().amax(dim=1, keepdim=True) / grid.limit
    best, least = largest.clone(), torch.full_like(largest, math.inf)
    safe = largest.clamp_min(torch.finfo(values.dtype).tiny)
    for ratio in torch.logspace(math.log10(MIN_RATIO), 0.0, RATIOS).tolist():
        step = safe * ratio
        error = grid.nearest(values / step).mul_(step).sub_(values).square_().mean(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, step, best)
    return torch.where(largest > 0, best, 0.0).squeeze(1)


class _Scales:
    """Sets scales of activations, each when its values are there.

    Args:
        layers: All that read codes.
    """

    def __init__(self, layers: Iterable[QuantizedLayer]) -> None:
        self._readers: dict[CodeSource, list[QuantizedLayer]] = {}
        for layer in layers:
            self._readers.setdefault(layer.quantizer, []).append(layer)

    def set(self, quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Set a quantizer, a forward pre-hook's arguments."""
        _set_activation_scale(quantizer, args)
        readers = self._readers.get(quantizer, []) if isinstance(quantizer, ActivationQuantizer) else []
        spare = [_mixes(reader) and reader.bits.activation - reader.bits.weight >= SPARE_BITS for reader in readers]
        # A ceiling is clipped by the codes, so its scale cannot be coarser.
        if spare and all(spare) and quantizer.learns and quantizer.ceiling is None:
            quantizer.log_scale.data.add_(_coarsening(readers).log())


def _coarsening(readers: Sequence[QuantizedLayer]) -> Tensor:
    """Return by how much coarser each channel's codes, C, may be than they are, 1 to ``COARSEST``."""
    power = torch.zeros_like(readers[0].quantizer.scale())
    tiny = torch.finfo(power.dtype).tiny
    for reader in readers:
        square = reader.folded_weight().detach().square()
        power += square.sum([d for d in range(square.dim()) if d != 1]) / square.sum().clamp_min(tiny)
    ratio = (power.max() / power.clamp_min(tiny)).pow(EQUALIZED / 2)
    return ratio.clamp(1.0, COARSEST)


def _mixes(layer: QuantizedLayer) -> bool:
    """Whether each output reads all channels of the input, so that one step is for the weights of all."""
    return not isinstance(layer, QuantizedConv2d) or layer.groups == 1


def _set_activation_scale(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
    if not isinstance(quantizer, ActivationQuantizer):
        raise TypeError(type(quantizer).__name__)
    if not quantizer.learns:
        return
    (x,) = args
    rows = x.detach().abs().transpose(0, 1).flatten(1)
    if quantizer.bits >= WHOLE_RANGE_BITS:
        scale = rows.amax(1) / quantizer.code_range.hi
    else:
        scale = best_step(rows[:, :: -(-rows.shape[1] // SAMPLES)], WeightGrid(quantizer.code_range.hi, 1))
    if quantizer.reach is None:
        scale = scale * MARGIN
    else:
        scale = torch.maximum(scale, quantizer.reach.to(x.device) / quantizer.code_range.hi)
    top = float(scale.max())
    quantizer.log_scale.data.copy_(scale.clamp_min(DEAD_RATIO * top if top > 0 else 1.0).log())


def _channel_means(x: Tensor) -> Tensor:
    return x.detach().mean([d for d in range(x.dim()) if d != 1])


def _centred(output: Tensor) -> Tensor:
    """Return N×O×… less each channel's mean, as O×samples."""
    rows = output.transpose(0, 1).flatten(1)
    return rows - rows.mean(1, keepdim=True)


class _Layers:
    """Sets steps, weights and biases of layers, each when what it reads is set.

    Args:
        layers: All that there are.
    """

    def __init__(self, layers: Iterable[QuantizedLayer]) -> None:
        self._rounded_off: dict[ActivationQuantizer, Tensor] = {}  # mean of value minus code, in codes, C
        self._values: dict[CodeSource, Tensor] = {}  # of quantizers whose codes layers will read
        self._waiting = Counter(layer.quantizer for layer in layers)

    def watch(self, quantizer: nn.Module, args: tuple[Tensor, ...], codes: Tensor) -> None:
        """Keep what the codes of a quantizer, a forward hook's arguments, lack of its values in the mean."""
        if not isinstance(quantizer, ActivationQuantizer):
            raise TypeError(type(quantizer).__name__)
        self._rounded_off[quantizer] = _channel_means(args[0]) / quantizer.scale() - _channel_means(codes)
        if self._waiting[quantizer]:
            self._values[quantizer] = args[0].detach()

    def set(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Set a layer, a forward pre-hook's arguments."""
        if not isinstance(layer, QuantizedLayer):
            raise TypeError(type(layer).__name__)
        weight = layer.folded_weight().detach()
        rows = weight.flatten(1)
        clipped = layer.bits.weight < CLIP_BELOW_BITS
        alone = clipped and rows.shape[1] > LARGEST  # of its inputs too little is known to tell what an error does
        step = best_step(rows, layer.grid) if alone else rows.abs().amax(1) / layer.grid.limit
        # A row of zeros would have no step, and a nearly dead one a bias of astronomic code.
        step = torch.maximum(step, layer.bias.detach().abs() / BIAS_CODES)
        layer.log_step.data.copy_(torch.where(step > 0, step, NO_STEP).log())
        settle_weights(layer, args[0], CLIPS if clipped else (1.0,))
        self._correct_slope(layer, weight, args[0])
        self._correct_bias(layer, weight, args[0])
        self._waiting[layer.quantizer] -= 1
        if not self._waiting[layer.quantizer]:
            self._values.pop(layer.quantizer, None)

    def _correct_slope(self, layer: QuantizedLayer, weight: Tensor, codes: Tensor) -> None:
        """Stretch a layer's steps until its output has slope 1 on what unrounded weights make of unrounded input."""
        values, scale = self._values.get(layer.quantizer), layer.quantizer.scale()
        # Of rearranged codes nobody knows the values; then it is the slope that rounding of the weights leaves.
        read = codes if values is None else values / scale.view(1, -1, *[1] * (values.dim() - 2))
        exact = _centred(layer.transform(read, weight))
        rounded = _centred(layer.transform(codes, layer.quantized_weight_and_bias()[0].detach()))
        common, whole = (exact * rounded).mean(1), exact.square().mean(1)
        slope = torch.where(common > 0, common / whole.clamp_min(torch.finfo(whole.dtype).tiny), 1.0)
        stretch = slope.reciprocal().nan_to_num(1.0, 1.0, 1.0).clamp(*STRETCH)
        step = torch.maximum(layer.log_step.exp() * stretch, layer.bias.detach().abs() / BIAS_CODES)
        stretch = step / layer.log_step.exp()
        layer.log_step.data.copy_(step.log())
        layer.weight.data.mul_(stretch.view(-1, *[1] * (layer.weight.dim() - 1)))

    def _correct_bias(self, layer: QuantizedLayer, weight: Tensor, codes: Tensor) -> None:
        """Let a layer's mean output be what its unrounded folded weight makes of unrounded input."""
        mean = _channel_means(codes)
        unrounded = mean + layer.quantizer.gather(self._rounded_off.__getitem__)
        step = layer.log_step.exp().view(-1, *[1] * (layer.weight.dim() - 1))
        rounded = layer.weight_codes() * step * layer.by_input(mean)
        layer.bias.data.add_((weight * layer.by_input(unrounded) - rounded).flatten(1).sum(1))


def _imposing(moments: Moments) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda module, arguments, output: moments.impose(output)


@torch.no_grad()
def calibrate(student: nn.Module, images: Tensor) -> None:
    """Set all scales, and correct the biases, of a deployable student in place; once, since biases would shift again.

    Args:
        student: As ``build_student`` returns it.
        images: N×C×H×W float32, N ≥ 1; the first 512 are used at most.
    """
    count = max(1, min(len(images), 512, ELEMENTS // max(1, images[0].numel())))
    hooks = []
    quantized = [module for module in student.modules() if isinstance(module, QuantizedLayer)]
    layers, scales = _Layers(quantized), _Scales(quantized)
    for module in student.modules():
        moments = Moments.behind(module) if isinstance(module, BATCH_NORM_TYPES) else None
        if isinstance(module, ActivationQuantizer):
            hooks.append(module.register_forward_pre_hook(scales.set))
            hooks.append(module.register_forward_hook(layers.watch))
        elif isinstance(module, QuantizedLayer):
            hooks.append(module.register_forward_pre_hook(layers.set))
            moments = module.moments
        if moments is not None:
            hooks.append(module.register_forward_hook(_imposing(moments)))
    try:
        student(images[:count])
    finally:
        for hook in hooks:
            hook.remove()
