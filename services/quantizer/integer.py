"""The integer form of a deployable student: what is exported, and the reference that every export is held to.

Activations are integer codes, weights int8 codes, sums exact integers, each layer ends with one multiply per output
channel. float32 carries the integers: below 2^24 its sums are exact, so that order, batch size, threads and kernel do
not matter and two correct runtimes agree bit for bit. (Fake quantization on floats does not have this property: a last
bit decides a code at .5, and the flip spreads.)

Codes that are not signed bytes, 0 to 255 say, are carried less a shift: the bias of the layer that makes them takes it
off, and the bias of each that reads them gives it back.
"""

import copy
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from services.quantizer.calibrate import BIAS_CODES
from services.quantizer.codes import CodesMean, CodesPool, Dequantize
from services.quantizer.graph import BATCH_NORM_TYPES, batch_norm_affine, input_of, module_of, rearranges, set_module
from services.quantizer.integer_modules import (
    EXACT_LIMIT,
    Affine,
    Codes,
    Hardsigmoid,
    Hardswish,
    IntegerConv2d,
    IntegerLayer,
    IntegerLinear,
    PoolScale,
    Scale,
    Sigmoid,
    SiLU,
    SumScale,
)
from services.quantizer.learned import ActivationQuantizer, QuantizedConv2d, QuantizedLayer, QuantizedLinear

_FLOAT_FORMS = {nn.Sigmoid: Sigmoid, nn.SiLU: SiLU, nn.Hardsigmoid: Hardsigmoid, nn.Hardswish: Hardswish}


def to_integer(student: fx.GraphModule) -> fx.GraphModule:
    """Return the integer form of a calibrated deployable student; the student is left as it is.

    Scales are folded into the producing layer wherever nothing but ReLU, ReLU6 or a pooling by maximum lies between
    (they commute with a positive factor), and a ReLU whose only reader clips at zero anyway disappears.
    """
    result = copy.deepcopy(student)
    quantizers = {
        node: module
        for node in result.graph.nodes
        if isinstance(module := module_of(result, node), ActivationQuantizer)
    }
    for node, quantizer in quantizers.items():
        _leave_room_for_shift(result, node, quantizer)
    for node in list(result.graph.nodes):
        module = module_of(result, node)
        lowered = _lowered(node, module) if module is not None else None
        if lowered is not None:
            set_module(result, str(node.target), lowered)
    for node, quantizer in quantizers.items():
        inverse = torch.exp(-quantizer.bounded_log_scale().detach())
        folded = _fold_inverse(result, node, inverse)
        shaped = None if folded else _per_channel(inverse, _rank(node))
        set_module(result, str(node.target), Codes(shaped, quantizer.code_range))
        if not quantizer.code_range.signed:
            _drop_rectifiers(result, node)
        if quantizer.code_range.shift:
            in_bias = folded and _fold_shift(result, node)
            _pad_before_rounding(result, node, -quantizer.code_range.shift if in_bias else 0)
    result.delete_all_unused_submodules()
    result.graph.lint()
    result.recompile()
    return result.requires_grad_(False)


def _lowered(node: fx.Node, module: nn.Module) -> nn.Module | None:
    """Return the integer form of a module of the student, or None where it stays as it is."""
    if isinstance(module, QuantizedConv2d):
        return IntegerConv2d(module)
    if isinstance(module, QuantizedLinear):
        return IntegerLinear(module)
    if isinstance(module, Dequantize):
        return Scale(_per_channel(module.quantizer.scale(), _rank(node)))
    if isinstance(module, CodesMean):
        height, width = input_of(node).meta["tensor_meta"].shape[2:]
        return SumScale(_per_channel(module.quantizer.scale() / (height * width), 4))
    if isinstance(module, CodesPool):
        return PoolScale(module.pool, _per_channel(module.quantizer.scale(), 4))
    if isinstance(module, BATCH_NORM_TYPES):
        factor, shift = batch_norm_affine(module)
        return Affine(_per_channel(factor.float(), _rank(node)), _per_channel(shift.float(), _rank(node)))
    form = _FLOAT_FORMS.get(type(module))
    return form() if form is not None else None


def _per_channel(values: Tensor, rank: int) -> Tensor:
    return values.reshape(1, -1, *[1] * (rank - 2))


def _rank(node: fx.Node) -> int:
    return len(node.meta["tensor_meta"].shape)


def _fold_inverse(model: fx.GraphModule, node: fx.Node, inverse: Tensor) -> bool:
    """Multiply the producer's factor by ``inverse`` if nothing but positively homogeneous operations lies between."""
    source = input_of(node)
    while len(source.users) == 1:
        module = module_of(model, source)
        if isinstance(module, (IntegerLayer, SumScale, PoolScale, Affine)):
            module.factor = module.factor * inverse.view(module.factor.shape)
            if isinstance(module, Affine):
                module.shift = module.shift * inverse.view(module.shift.shape)
            return True
        flat = isinstance(module, nn.Flatten) and input_of(source).meta["tensor_meta"].shape[2:].numel() == 1
        # ReLU6 counts: its ceiling is clipped by the codes (ActivationQuantizer.ceiling), and the module is dropped.
        if not flat and not isinstance(module, (nn.ReLU, nn.ReLU6, nn.MaxPool2d)):
            return False
        source = input_of(source)
    return False


def _leave_room_for_shift(model: fx.GraphModule, node: fx.Node, quantizer: ActivationQuantizer) -> None:
    """Coarsen the steps of channels so far below their codes' that the shift would be no code of the bias."""
    source = input_of(node)
    while isinstance(module_of(model, source), (nn.ReLU, nn.ReLU6)):
        source = input_of(source)
    layer = module_of(model, source)
    if isinstance(layer, QuantizedLayer) and quantizer.code_range.shift:
        least = quantizer.scale() * abs(quantizer.code_range.shift) / BIAS_CODES
        layer.log_step.data = torch.maximum(layer.log_step.data, least.log())


def _fold_shift(model: fx.GraphModule, node: fx.Node) -> bool:
    """Let the bias of the layer that ``node`` reads from take the shift off, if nothing else lies between."""
    source = input_of(node)
    layer, codes = module_of(model, source), module_of(model, node)
    if not isinstance(layer, IntegerLayer) or not isinstance(codes, Codes) or len(source.users) > 1:
        return False
    bias = layer.bias
    layer.bias = bias - torch.round(codes.shift / layer.factor).flatten()
    if layer.accumulator_bound >= EXACT_LIMIT:
        layer.bias = bias
        return False
    codes.shift = 0
    return True


def _pad_before_rounding(model: fx.GraphModule, node: fx.Node, zero: int) -> None:
    """Pad what the codes of ``node`` are made of, with ``zero``, in place of the codes.

    Shifted codes are padded with another code than 0, which a convolution does not do by itself. TensorRT-RTX runs a
    convolution in INT8 with a padding before the rounding, and in float with one behind it. Its plan of
    EfficientNet-Lite0, whose stem's output is padded so, has no tensor more for it: what rounds the float that the
    convolution writes in any case writes the padding, too.
    """
    for user in list(node.users):
        reader = module_of(model, user)
        if user.target is F.pad:
            around = tuple(cast(Sequence[int], user.args[1]))
        elif isinstance(reader, IntegerConv2d) and any(reader.padding):
            high, wide = cast(Sequence[int], reader.padding)
            around, reader.padding = (wide, wide, high, high), (0, 0)
        else:
            continue
        with model.graph.inserting_before(node):
            padded = model.graph.call_function(F.pad, (input_of(node), around, "constant", float(zero)))
        with model.graph.inserting_after(node):
            codes = model.graph.call_module(str(node.target), (padded,))
        if user.target is F.pad:
            user.replace_all_uses_with(codes)
            model.graph.erase_node(user)
            _pad_before_rounding(model, codes, zero)
        else:
            user.replace_input_with(node, codes)
    if not node.users:
        model.graph.erase_node(node)


def _drop_rectifiers(model: fx.GraphModule, node: fx.Node) -> None:
    """Remove ReLU and ReLU6 above ``node``, whose clip at zero (and at the ceiling) does the same."""
    source = input_of(node)
    while len(source.users) == 1:
        module = module_of(model, source)
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            above = input_of(source)
            source.replace_all_uses_with(above)
            model.graph.erase_node(source)
            source = above
        elif isinstance(module, nn.MaxPool2d):
            source = input_of(source)
        else:
            return


def integer_layers(model: fx.GraphModule) -> list[tuple[str, IntegerLayer, bool]]:
    """Return (name, layer, whether its input's codes come with the scale folded) in order of execution."""
    found = []
    for node in model.graph.nodes:
        module = module_of(model, node)
        if isinstance(module, IntegerLayer):
            codes = module_of(model, input_of(node))
            found.append((str(node.target), module, isinstance(codes, Codes) and codes.inverse is None))
    return found


def float_operations(model: fx.GraphModule) -> list[str]:
    """Return "name (kind)" of what works on floating point: not codes, integer layers, or rearrangement of codes."""
    inside = (Codes, Scale, SumScale, PoolScale, IntegerLayer, nn.Flatten, nn.MaxPool2d, nn.Identity)
    found = []
    for node in model.graph.nodes:
        if node.op in ("call_function", "call_method"):
            if not _pads_for_codes(model, node) and not carries_codes(model, node):
                found.append(f"{node.name} ({getattr(node.target, '__name__', node.target)})")
        elif node.op == "call_module" and not isinstance(module := module_of(model, node), inside):
            found.append(f"{node.target} ({type(module).__name__})")
    return found


def _pads_for_codes(model: fx.GraphModule, node: fx.Node) -> bool:
    return node.target is F.pad and all(isinstance(module_of(model, user), Codes) for user in node.users)


def carries_codes(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the values of ``node`` are codes, as they are made or rearranged."""
    if rearranges(model, node):
        return all(carries_codes(model, above) for above in node.all_input_nodes)
    return isinstance(module_of(model, node), Codes)


def is_exact(model: fx.GraphModule) -> bool:
    """Whether no accumulator can leave the range in which float32 counts exactly."""
    return all(layer.accumulator_bound < EXACT_LIMIT for _, layer, _ in integer_layers(model))


def packed_bytes(model: fx.GraphModule) -> int:
    """Return the bytes of all weights at their own bit widths plus scales and biases in float32."""
    total = 0
    for _, layer, _ in integer_layers(model):
        total += int(np.ceil(layer.codes.numel() * layer.bits.weight / 8)) + 4 * (
            layer.bias.numel() + layer.factor.numel()
        )
    scales = [m.inverse for m in model.modules() if isinstance(m, Codes) and m.inverse is not None]
    factors = [m.factor for m in model.modules() if isinstance(m, (Scale, SumScale, PoolScale))]
    affines = [t for m in model.modules() if isinstance(m, Affine) for t in (m.factor, m.shift)]
    return total + sum(4 * t.numel() for t in (*scales, *factors, *affines))
