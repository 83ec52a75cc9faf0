"""How far real activations reach, by the BatchNorm statistics that training left in the model.

Synthetic images match the statistics on average but visit fewer extremes than real ones, above all in the last layers.
A BatchNorm says more: its output has mean β and variance γ² per channel over the training data. These two moments are
carried through the graph (a sum of branches adds them, a ReLU turns them into those of a rectified normal), and
``reach`` is the mean plus so many standard deviations as the number of codes deserves (Nagel et al. 2019 bound ranges
this way for data-free quantization).
"""

import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from services.quantizer.graph import BATCH_NORM_TYPES, ceiling_of, input_of, module_of


class Moments(NamedTuple):
    """Per channel, C: mean and variance, and those from before a rectifier, where the tail is still whole."""

    mean: Tensor
    variance: Tensor
    tail_mean: Tensor
    tail_variance: Tensor


IMAGE_REACH = 3.0
"""Of an input whose pixel range is unknown: it is standardized by custom, so three standard deviations."""


def deviations(bits: int) -> float:
    """Return how many standard deviations codes of ``bits`` should cover: more codes afford a wider range."""
    return 1.2 + 0.5 * bits


def _normal(mean: Tensor, variance: Tensor) -> Moments:
    return Moments(mean, variance, mean, variance)


def _above_zero(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the mean square of max(0, z) with z normal."""
    ratio = mean / std
    density = torch.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    above = 0.5 * (1 + torch.erf(ratio / math.sqrt(2)))
    return mean * above + std * density, (mean**2 + std**2) * above + mean * std * density


def _rectified(moments: Moments, ceiling: float | None) -> Moments:
    """Return the moments of max(0, z), or of what remains of it below a ceiling, with z normal."""
    std = moments.variance.clamp_min(1e-12).sqrt()
    first, second = _above_zero(moments.mean, std)
    if ceiling is not None:
        # min(r, c) = r − max(0, r − c), and its square is r² − (2c·max(0, r − c) + max(0, r − c)²).
        cut, cut_square = _above_zero(moments.mean - ceiling, std)
        first, second = first - cut, second - 2 * ceiling * cut - cut_square
    return Moments(first, (second - first**2).clamp_min(0), moments.tail_mean, moments.tail_variance)


def propagate(model: fx.GraphModule) -> dict[fx.Node, Moments]:
    """Return the moments of each node of a float graph for which they follow from BatchNorm layers."""
    known: dict[fx.Node, Moments] = {}
    for node in model.graph.nodes:
        module = module_of(model, node)
        if isinstance(module, BATCH_NORM_TYPES):
            size = module.num_features
            beta = module.bias.detach() if module.bias is not None else torch.zeros(size)
            gamma = module.weight.detach() if module.weight is not None else torch.ones(size)
            known[node] = _normal(beta, gamma**2)
        elif node.op == "call_function" and node.target is operator.add:
            parts = [known.get(a) for a in node.args if isinstance(a, fx.Node)]
            if len(parts) == 2 and parts[0] is not None and parts[1] is not None:
                # Branches are taken as independent.
                known[node] = _normal(parts[0].mean + parts[1].mean, parts[0].variance + parts[1].variance)
        elif isinstance(module, (nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.AvgPool2d)):
            moments = known.get(input_of(node))
            if moments is None or (isinstance(module, nn.Flatten) and _grows(node)):
                continue
            rectifies = isinstance(module, (nn.ReLU, nn.ReLU6))
            known[node] = _rectified(moments, ceiling_of(model, node)) if rectifies else moments
    return known


def _grows(node: fx.Node) -> bool:
    return bool(node.meta["tensor_meta"].shape[1] != input_of(node).meta["tensor_meta"].shape[1])


def reach(moments: Moments, bits: int) -> Tensor:
    """Return the magnitude, C, that a channel's values seldom exceed."""
    return moments.tail_mean.abs() + deviations(bits) * moments.tail_variance.sqrt()
