"""Keeps the INT8 kernels of x86 processors without VNNI exact.

Their multiply-add of unsigned by signed bytes sums two products in 16 bits and saturates. Codes and weights of at most
127 cannot reach that (2 · 127 · 127 < 32768). Larger codes can: those of signed activations, unsigned bytes around 128.
"""

import onnx
from onnx import TensorProto, numpy_helper

from services.evaluator.graph import constants_of

SAFE_CODE = 127


def codes_may_exceed_127(model: onnx.ModelProto) -> bool:
    """Return whether an unsigned 8-bit activation code above 127 can reach a layer.

    Codes are safe only where every use of a QuantizeLinear's output is a Clip with a constant maximum up to 127.
    """
    constants = constants_of(model.graph)
    uses: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node)
    outputs = {v.name for v in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            return True
        if node.op_type != "QuantizeLinear" or not _is_uint8(node, constants):
            continue
        consumers = uses.get(node.output[0], [])
        if node.output[0] in outputs or not all(_clips_to_safe(c, constants) for c in consumers):
            return True
    return False


def with_weight_zero_points(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every per-channel DequantizeLinear of INT8 weights states its zero points, all 0.

    Where they are left out, ONNX Runtime's conversion of the weights to unsigned bytes adds a single zero point instead
    of one per channel, and the kernel then refuses its own graph (1.32).
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    constants = constants_of(copy.graph)
    for node in copy.graph.node:
        if node.op_type != "DequantizeLinear" or (len(node.input) > 2 and node.input[2]):
            continue
        weight, scale = constants.get(node.input[0]), constants.get(node.input[1])
        if weight is None or scale is None or weight.data_type != TensorProto.INT8 or not scale.dims:
            continue
        name = f"{node.output[0]}__zero_points"
        zeros = numpy_helper.to_array(scale).astype("int8") * 0
        copy.graph.initializer.append(numpy_helper.from_array(zeros, name))
        inputs = [node.input[0], node.input[1], name]
        del node.input[:]
        node.input.extend(inputs)
    return copy


def _is_uint8(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    declared = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
    if declared:
        return bool(declared == TensorProto.UINT8)
    if len(node.input) < 3 or not node.input[2]:
        return True
    zero = constants.get(node.input[2])
    return zero is None or zero.data_type == TensorProto.UINT8


def _clips_to_safe(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type != "Clip" or len(node.input) < 3:
        return False
    limit = constants.get(node.input[2])
    return limit is not None and int(numpy_helper.to_array(limit).max()) <= SAFE_CODE
