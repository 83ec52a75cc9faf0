"""Where a deployable student's activations become codes.

Codes are made where a value is made, once, and everything that reads the value reads the same codes: layers and
poolings as they are, others (a residual addition, a multiplication) dequantized. Concatenations, splits and channel
shuffles between the two move the codes themselves, so that an engine carries them in 8 bits and nothing is rounded
again on the way.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from services.quantizer.codes import Dequantize, Rearranged
from services.quantizer.graph import (
    LAYER_TYPES,
    ceiling_of,
    channels_of,
    input_of,
    insert_module,
    is_non_negative,
    module_of,
    rearranges,
)
from services.quantizer.learned import ActivationQuantizer, CodeRange, CodeSource

IMAGE_REACH = 3.0
"""Of an input whose pixel range is unknown: it is standardized by custom, so three standard deviations."""

WHOLE_RANGE_BITS = 7
"""From so many bits on codes cover all that a ceiling allows: their steps are so fine that a clipped tail, which is
seldom as light as a normal distribution's, errs far more than the wider range does."""

BYTE_BITS = 8
"""Of codes that fill a byte, with a shift where they are not signed bytes."""

PADDED_SHARE = 1 / 16
"""Of all values that layers read: how many may be padded in front of their rounding so that their codes fill a byte.
An engine that rounds within its convolutions must write such a tensor in float. The first ones are taken, since their
errors pass through all that follows: in EfficientNet-Lite0 the stem's output, 5.8 % of the values, gains 2.4 dB, and
all others together 0.4 dB more."""

OFF_LEVEL = 0.25
"""Of the step between two levels of a pixel: how far from one the value 0 may lie."""


def codes_of_pixels(black: Tensor, white: Tensor) -> CodeRange | None:
    """Return the codes of an image's 256 levels at the step between two of them.

    Rounding at other steps than the pixels' own errs differently in each flat area of an image, and alike all over it,
    so that no layer averages it out. At their own, it adds a constant at most, which the bias correction takes back.

    Args:
        black: Value of a black pixel, C, not above 0.
        white: Value of a white pixel, C, above black.

    Returns:
        The codes, or None where channels differ in them, or where the value 0 lies between two levels.
    """
    lowest = 255 * black / (white - black)
    lo = round(float(lowest[0]))
    return CodeRange(lo, lo + 255) if -255 <= lo <= 0 and bool(((lowest - lo).abs() <= OFF_LEVEL).all()) else None


class CodePlacement:
    """Inserts quantizers into a student's graph.

    Args:
        student: Changed in place.
        pixel_range: What black and white are in the model's input, C each; None where nothing is known.
    """

    def __init__(self, student: fx.GraphModule, pixel_range: tuple[Tensor, Tensor] | None) -> None:
        self._student = student
        self._pixel_range = pixel_range
        self._made: dict[tuple[fx.Node, int], tuple[fx.Node, ActivationQuantizer]] = {}
        self._moved: dict[tuple[fx.Node, int], tuple[fx.Node, Rearranged]] = {}
        self._copies: dict[tuple[fx.Node, int], fx.Node] = {}
        read = {input_of(node) for node in student.graph.nodes if isinstance(module_of(student, node), LAYER_TYPES)}
        self._values_to_pad = PADDED_SHARE * sum(_size(node) for node in read)

    def codes_of(self, source: fx.Node, bits: int) -> tuple[fx.Node, CodeSource]:
        """Return the node of the codes of ``source``, N×C×…, and where they are made; insert what is missing."""
        key = source, bits
        if key in self._made:
            return self._made[key]
        if key not in self._moved and rearranges(self._student, source):
            moved = self._rearranged(source, bits)
            if moved is not None:
                self._moved[key] = self._copy(source, bits), moved
        return self._moved[key] if key in self._moved else self._make(source, bits)

    def any_codes_of(self, source: fx.Node, bits: int) -> tuple[fx.Node, CodeSource]:
        """Return codes of ``source`` that exist, of whatever width, or else new ones of ``bits``."""
        found = [pair for made in (self._made, self._moved) for (node, _), pair in made.items() if node is source]
        return found[0] if found else self.codes_of(source, bits)

    def finish(self) -> None:
        """Let all other readers of a value read its dequantized codes, of the most bits where there are several."""
        self._move_what_is_made()
        places = {node: place for place, node in enumerate(self._student.graph.nodes)}
        by_source: dict[fx.Node, list[tuple[fx.Node, CodeSource]]] = {}
        for made in (self._made, self._moved):
            for (source, _), pair in made.items():
                by_source.setdefault(source, []).append(pair)
        # Backwards, so that float rearrangements that nobody reads any more are gone when their sources' turn comes.
        for source in sorted(by_source, key=lambda node: places[node], reverse=True):
            pairs = by_source[source]
            own = {codes for codes, _ in pairs}
            others = [user for user in source.users if user not in own]
            if others:
                codes, quantizer = max(pairs, key=lambda pair: pair[1].bits)
                values = insert_module(self._student, codes, codes, f"values_{source.name}", Dequantize(quantizer))
                for user in others:
                    user.replace_input_with(source, values)
            self._erase_unread(source)

    def _move_what_is_made(self) -> None:
        """Carry rearrangements that no layer reads as codes, too, where all their values are made as codes anyway."""
        copies = set(self._copies.values())
        for node in list(self._student.graph.nodes):
            if not rearranges(self._student, node) or node in copies or any(n is node for n, _ in self._moved):
                continue
            if all(rearranges(self._student, user) for user in node.users):
                continue
            widths = [{bits for made, bits in self._made if made is origin} for origin in self._origins(node)]
            common = set.intersection(*widths)
            moved = self._rearranged(node, max(common)) if common else None
            if moved is not None:
                self._moved[node, max(common)] = self._copy(node, max(common)), moved

    def _make(self, source: fx.Node, bits: int) -> tuple[fx.Node, ActivationQuantizer]:
        signed = not is_non_negative(self._student, source)
        code_range = CodeRange.of(bits, signed)
        ceiling = ceiling_of(self._student, source)
        whole_bytes = bits == BYTE_BITS and self._may_be_shifted(source, signed=signed)
        if whole_bytes and not signed:
            code_range = CodeRange(0, 255)
        reach = step = None
        if source.op == "placeholder":
            reach = torch.full((channels_of(source),), IMAGE_REACH)
            if self._pixel_range is not None:
                black, white = self._pixel_range
                reach = torch.maximum(black.abs(), white.abs())
                pixels = codes_of_pixels(black, white) if whole_bytes else None
                if pixels is not None:
                    code_range, step = pixels, (white - black) / 255
        elif ceiling is not None and bits >= WHOLE_RANGE_BITS:
            reach = torch.full((channels_of(source),), ceiling)
        quantizer = ActivationQuantizer(channels_of(source), code_range, bits, ceiling, reach, step)
        name = f"codes_{source.name}" + (f"_{bits}" if any(s is source for s, _ in self._made) else "")
        self._made[source, bits] = insert_module(self._student, source, source, name, quantizer), quantizer
        return self._made[source, bits]

    def _may_be_shifted(self, source: fx.Node, *, signed: bool) -> bool:
        """Whether all that reads a value can take back a shift of its codes.

        A layer that pads can, with an operation of its own in front of the rounding: an image always has it, other
        values while they are few (``PADDED_SHARE``).
        """
        if self._only_layers_read(source, padded=False):
            return True
        if not self._only_layers_read(source, padded=True):
            return False
        if source.op != "placeholder" and not signed:
            self._values_to_pad -= _size(source)
            return self._values_to_pad >= 0
        return True

    def _only_layers_read(self, node: fx.Node, *, padded: bool) -> bool:
        """Whether layers alone read a value, ``padded``: those that pad, or behind a padding, as well."""
        for user in node.users:
            reader = module_of(self._student, user)
            if user.target is F.pad and rearranges(self._student, user):
                if not (padded and self._only_layers_read(user, padded=padded)):
                    return False
                continue
            if not isinstance(reader, (*LAYER_TYPES, ActivationQuantizer)):
                return False
            if not padded and isinstance(reader, nn.Conv2d) and any(reader.padding):
                return False
        return True

    def _rearranged(self, source: fx.Node, bits: int) -> Rearranged | None:
        """Return the scales of the codes of a rearrangement, or None where the values must be quantized behind it."""
        origins = self._origins(source)
        if any(node.op not in ("placeholder", "call_module", "call_function") for node in origins):
            return None
        if len({is_non_negative(self._student, node) for node in origins}) > 1:
            return None  # signed and unsigned codes of as many bits count differently
        order = self._order(source, origins)
        if order is None:
            return None
        parts = [(self._made.get((node, bits)) or self._make(node, bits))[1] for node in origins]
        return Rearranged(parts, order)

    def _origins(self, source: fx.Node) -> list[fx.Node]:
        """Return the nodes that make the values that ``source`` rearranges, in order of execution."""
        found: list[fx.Node] = []
        stack, seen = [source], {source}
        while stack:
            node = stack.pop()
            if not rearranges(self._student, node):
                found.append(node)
                continue
            for above in node.all_input_nodes:
                if above not in seen:
                    seen.add(above)
                    stack.append(above)
        places = {node: place for place, node in enumerate(self._student.graph.nodes)}
        return sorted(found, key=lambda node: places[node])

    def _order(self, source: fx.Node, origins: list[fx.Node]) -> Tensor | None:
        """Follow numbered channels through a rearrangement; None where a channel of the result mixes several."""
        values: dict[fx.Node, Any] = {}
        first = 0
        for node in origins:
            shape = node.meta["tensor_meta"].shape
            numbers = torch.arange(first, first + shape[1], dtype=torch.float64)
            values[node] = numbers.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
            first += shape[1]

        def value(node: fx.Node) -> Any:
            if node not in values:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                module = module_of(self._student, node)
                call: Any = module if module is not None else node.target
                # Zeros around a channel are worth the same at every scale, so its own number may stand for them.
                values[node] = _pad_with_itself(*args) if call is F.pad else call(*args, **kwargs)
            return values[node]

        result: Tensor = value(source)
        rows = result[0].reshape(result.shape[1], -1)
        return rows[:, 0].long() if bool((rows == rows[:, :1]).all()) else None

    def _copy(self, node: fx.Node, bits: int) -> fx.Node:
        """Return a node that rearranges codes as ``node`` rearranges values."""
        if (node, bits) in self._made:
            return self._made[node, bits][0]
        if (node, bits) not in self._copies:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda above: self._copy(above, bits))
            graph = self._student.graph
            with graph.inserting_after(node):
                copy = graph.create_node(node.op, node.target, args, kwargs, f"codes_{node.name}")
            copy.meta["tensor_meta"] = node.meta["tensor_meta"]
            self._copies[node, bits] = copy
        return self._copies[node, bits]

    def _erase_unread(self, node: fx.Node) -> None:
        if node.users or not rearranges(self._student, node):
            return
        above = node.all_input_nodes
        self._student.graph.erase_node(node)
        for source in above:
            self._erase_unread(source)


def _size(node: fx.Node) -> int:
    """Return the number of a value's elements of one sample."""
    return int(node.meta["tensor_meta"].shape[1:].numel())


def _pad_with_itself(x: Any, around: Any, *_: Any) -> Tensor:
    return F.pad(x, [*around, 0, 0][:4], mode="replicate")


def pooling_windows(node: fx.Node, pool: nn.Module) -> nn.Module:
    """Return an average pooling with fixed windows where ``pool`` adapts them to a size that they divide evenly."""
    if not isinstance(pool, nn.AdaptiveAvgPool2d):
        return pool
    before = node.all_input_nodes[0].meta["tensor_meta"].shape[2:]
    after = node.meta["tensor_meta"].shape[2:]
    if any(b % a for b, a in zip(before, after, strict=True)):
        return pool
    return nn.AvgPool2d(tuple(b // a for b, a in zip(before, after, strict=True)))
