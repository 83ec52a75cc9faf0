"""Reads out of a TensorRT-RTX plan which layers kept their INT8 weights.

A plan holds descriptions of its tensors in plain text. The format is not documented, so the audit has three answers: so
many layers are INT8, these are not, or the plan cannot be read. What it looks for was found by building graphs of which
the answer was known:

* A layer that runs in INT8 has its weight as an INT8 constant: dimensions as in the graph, the channels
  possibly padded (those of a group to a multiple of 4, the sides of a matrix to an even number); a matrix may be
  transposed.
* A layer that fell back to float has a float constant, or an INT8 constant and, beside it, a float buffer of the
  weight's dimensions, possibly padded as well, into which it is expanded at run time.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from services.evaluator.graph import Layer

_TENSOR = re.compile(rb"tensor=\{ ([ -~]*?) type=(\w+) \}")
_DIMS = re.compile(rb"\bdims=\{ ([^}]*) \}")
_FLOATS = (b"float", b"half", b"bfloat16")
_LARGEST_PADDING = 32

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FloatLayer:
    """A layer that does not run in INT8.

    Attributes:
        layer: Which.
        reason: Why, as the end of a sentence about it.
    """

    layer: Layer
    reason: str


@dataclass(frozen=True)
class PlanAudit:
    """What an engine says about the layers of its graph.

    Attributes:
        int8: Layers that run in INT8.
        total: Layers in the graph. Of those that are neither in INT8 nor in float, the engine does not tell.
        floats: Layers that run in floating point. Those with equal weight shapes cannot be told apart in a plan of
            TensorRT-RTX; when some of them fell back, the last ones are named.
    """

    int8: int
    total: int
    floats: tuple[FloatLayer, ...]


def why_float(layer: Layer) -> str:
    """Return what in the graph keeps a layer from running in INT8; empty where nothing does."""
    if not layer.int8_weight:
        return "its weight is stored in floating point"
    return "its input has one scale per channel" if layer.per_channel_activation else ""


def audit_plan(plan: bytes, layers: Sequence[Layer], fixed_batch: int | None) -> PlanAudit | None:
    """Find out which layers run in INT8.

    Args:
        plan: A plan of TensorRT-RTX.
        layers: Layers of the graph that it was built from.
        fixed_batch: The batch of a profile that admits only one. Activations then have only fixed dimensions as well,
            so a float buffer of this many outermost items is not taken for an expanded weight.

    Returns:
        The audit, or None when the plan holds no readable descriptions.
    """
    descriptions = _TENSOR.findall(plan)
    if not descriptions:
        return None
    constants, expanded = _shapes(descriptions)
    expanded = [shape for shape in expanded if shape[0] != fixed_batch]
    # Where shapes are equal, the layers that the graph itself gives away are the ones left without a constant.
    unplaced = sorted(layers, key=lambda layer: not layer.int8_weight)
    placed: list[Layer] = []
    # Exact fits first, so that a padded fit does not take the constant of another layer.
    for fits in (_equal, _padded):
        for layer in list(unplaced):
            fitting = [c for c in constants if fits(layer.weight_shape, c)]
            if fitting:
                found = min(fitting, key=math.prod)
                constants.remove(found)
                unplaced.remove(layer)
                placed.append(layer)
    floats = {layer: why_float(layer) or "the plan holds no INT8 weight of its shape" for layer in unplaced}
    placed.sort(key=lambda layer: not layer.per_channel_activation)
    for fits in (_equal, _padded):
        for layer in [layer for layer in placed if layer not in floats]:
            buffers = [e for e in expanded if fits(layer.weight_shape, e)]
            if buffers:
                expanded.remove(min(buffers, key=math.prod))
                floats[layer] = why_float(layer) or "the plan expands its INT8 weight into floating point"
    named = tuple(FloatLayer(layer, floats[layer]) for layer in layers if layer in floats)
    return PlanAudit(len(layers) - len(floats), len(layers), named)


def _shapes(descriptions: Sequence[tuple[bytes, bytes]]) -> tuple[list[Shape], list[Shape]]:
    """Return the shapes of INT8 constants, and of float buffers with only fixed dimensions."""
    constants: list[Shape] = []
    buffers: list[Shape] = []
    for description, kind in descriptions:
        dims = _DIMS.search(description)
        words = dims.group(1).split() if dims else []
        if len(words) < 2 or not all(word.isdigit() for word in words):
            continue
        shape = tuple(int(word) for word in words)
        constant = b"const_payload_size=" in description
        if constant and kind == b"int8":
            constants.append(shape)
        elif not constant and kind in _FLOATS:
            buffers.append(shape)
    return constants, buffers


def _equal(weight: Shape, shape: Shape) -> bool:
    return shape == weight or (len(weight) == 2 and shape == weight[::-1])


def _padded(weight: Shape, shape: Shape) -> bool:
    if len(weight) != len(shape):
        # A matrix may be held as a 1×1 convolution.
        return len(weight) == 2 and len(shape) == 4 and shape[2:] == (1, 1) and _padded(weight, shape[:2])
    if len(weight) == 2:
        return _pads(weight, shape) or _pads(weight[::-1], shape)
    return weight[2:] == shape[2:] and _pads(weight[:2], shape[:2])


def _pads(lengths: Shape, padded: Shape) -> bool:
    """Return whether each length is equal, or rounded up to an even number no further than to a multiple of 32."""
    return all(
        b == a or (b > a and b % 2 == 0 and b <= -(-a // _LARGEST_PADDING) * _LARGEST_PADDING)
        for a, b in zip(lengths, padded, strict=True)
    )
