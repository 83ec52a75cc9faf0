"""Rewrites the TensorRT flavour of a quantized graph so that ONNX Runtime on a CPU runs it with INT8 kernels.

The codes, weights and factors are the same; only how codes are carried differs. ONNX Runtime's kernels want unsigned
8-bit activations and the clip *behind* the quantization:

    QuantizeLinear(1, uint8 z) → Clip(lo+z, hi+z) → DequantizeLinear       z = 0, or 128 where codes are signed

A convolution that feeds a quantization directly becomes DequantizeLinear(weight, factor) → Conv(bias·factor), which the
runtime fuses to QLinearConv. Every other one, such as before a residual addition, stays a Conv of codes in float32,
whose sums are integers, exact up to 2^24 as in the other flavour: the runtime's kernel for the same, ConvInteger, would
take most of the graph's time. A linear layer becomes MatMulInteger → Cast → Add → Mul. What rearranges codes (a
concatenation, a channel shuffle) rearranges the unsigned bytes.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

_REARRANGEMENTS = frozenset(
    {
        "Concat",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)

_BOUNDS = {"least_sum": -(2.0**31), "largest_sum": 2.0**31}


@dataclass
class _Codes:
    """An activation's codes in the new graph: value names of the uint8 tensor and of its float form."""

    unsigned: str
    values: str
    zero_point: str


@dataclass
class _Rewriter:
    model: onnx.ModelProto
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    codes: dict[str, _Codes] = field(default_factory=dict)  # by the old float name

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.producer = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.initializers[name] = value
        return name

    def add(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def only_reader(self, name: str) -> NodeProto | None:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def quantizes_directly(self, name: str) -> bool:
        """Whether the value goes to one quantization and nowhere else."""
        reader = self.only_reader(name)
        for between in ("Pad", "Clip"):
            if reader is not None and reader.op_type == between:
                reader = self.only_reader(reader.output[0])
        return reader is not None and reader.op_type == "QuantizeLinear"


def _apart(trt: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which each layer has one factor: the exporter merges layers that differ in factors alone."""
    result = onnx.ModelProto()
    result.CopyFrom(trt)
    del result.graph.node[:]
    layers = {node.output[0]: node for node in trt.graph.node if node.op_type in ("Conv", "Gemm")}
    factors = Counter[str]()
    for node in trt.graph.node:
        sums = node.input[0] if node.op_type == "Mul" and node.input[0] in layers else ""
        if sums:
            factors[sums] += 1
        again = f"{sums}_{factors[sums]}" if factors[sums] > 1 else ""
        if again:
            twin = result.graph.node.add()
            twin.CopyFrom(layers[sums])
            twin.name, twin.output[0] = f"node_{again}", again
        kept = result.graph.node.add()
        kept.CopyFrom(node)
        if again:
            kept.input[0] = again
    return result


def to_onnx_runtime(trt: onnx.ModelProto) -> onnx.ModelProto:
    """Return the ONNX Runtime flavour of a graph that the quantizer exported for TensorRT; ``trt`` is left as it is."""
    trt = _apart(trt)
    rewriter = _Rewriter(trt)
    done: set[str] = set()  # outputs of old nodes that a later pattern has replaced
    for node in trt.graph.node:
        if node.op_type == "Constant" or node.output[0] in done:
            continue
        if node.op_type == "DequantizeLinear" and node.input[0] in rewriter.producer:
            _rewrite_codes(rewriter, node)
        elif node.op_type in ("Conv", "Gemm") and node.input[0] in rewriter.codes:
            multiply = rewriter.only_reader(node.output[0])
            if multiply is None or multiply.op_type != "Mul":
                raise ValueError(f"{node.name}: a quantized layer must be followed by its factor")
            _rewrite_layer(rewriter, node, multiply)
            done.add(multiply.output[0])
        elif _rearranges_codes(rewriter, node):
            _rewrite_rearrangement(rewriter, node)
        elif not _belongs_to_pattern(rewriter, node):
            kept = NodeProto()
            kept.CopyFrom(node)
            rewriter.nodes.append(kept)
    return _assemble(rewriter, trt)


def _belongs_to_pattern(rewriter: _Rewriter, node: NodeProto) -> bool:
    """Whether another rewrite takes this node along: weight dequantization, clip and quantization of codes."""
    if node.op_type == "DequantizeLinear":
        return True  # of a weight: its input is a constant
    if node.op_type == "QuantizeLinear":
        return True
    return node.op_type in ("Clip", "Pad") and rewriter.quantizes_directly(node.output[0])


def _rewrite_codes(rewriter: _Rewriter, dequantize: NodeProto) -> None:
    quantize = rewriter.producer[dequantize.input[0]]
    source, lo, hi = quantize.input[0], -128, 127
    clip = rewriter.producer.get(source)
    if clip is not None and clip.op_type == "Clip":
        lo, hi = (int(rewriter.constants[name]) for name in clip.input[1:3])
        source = clip.input[0]
    pad = rewriter.producer.get(source)
    if pad is not None and pad.op_type == "Pad":
        source = pad.input[0]
    name = dequantize.output[0]
    zero = 128 if lo < 0 else 0
    zero_point = rewriter.constant(f"zero_point_{zero}", np.array(zero, np.uint8))
    one = rewriter.constant("one", np.array(1, np.float32))
    unsigned = rewriter.add("QuantizeLinear", [source, one, zero_point], f"{name}_rounded")
    if (lo + zero, hi + zero) != (0, 255):
        bounds = [rewriter.constant(f"code_{b + zero}", np.array(b + zero, np.uint8)) for b in (lo, hi)]
        unsigned = rewriter.add("Clip", [unsigned, *bounds], f"{name}_codes")
    if pad is not None and pad.op_type == "Pad":
        code = int(rewriter.constants[pad.input[2]]) + zero
        around = rewriter.constant(pad.input[1], rewriter.constants[pad.input[1]])
        unsigned = rewriter.add(
            "Pad", [unsigned, around, rewriter.constant(f"code_{code}", np.array(code, np.uint8))], f"{name}_padded"
        )
    rewriter.add("DequantizeLinear", [unsigned, one, zero_point], name)
    rewriter.codes[name] = _Codes(unsigned, name, zero_point)


def _rearranges_codes(rewriter: _Rewriter, node: NodeProto) -> bool:
    """Whether a node only moves codes that have one zero point; sizes and axes are constants beside them."""
    data = [name for name in node.input if name and name not in rewriter.constants]
    known = [rewriter.codes[name] for name in data if name in rewriter.codes]
    return (
        node.op_type in _REARRANGEMENTS
        and 0 < len(known) == len(data)
        and len({codes.zero_point for codes in known}) == 1
    )


def _rewrite_rearrangement(rewriter: _Rewriter, node: NodeProto) -> None:
    moved = NodeProto()
    moved.CopyFrom(node)
    moved.name = f"{node.name}_codes"
    zero_point = next(rewriter.codes[name].zero_point for name in node.input if name in rewriter.codes)
    moved.input[:] = [rewriter.codes[name].unsigned if name in rewriter.codes else name for name in node.input]
    if node.op_type == "Pad":
        moved.input[2] = zero_point  # code 0, as unsigned byte
    moved.output[:] = [f"{name}_codes" for name in node.output]
    rewriter.nodes.append(moved)
    for name, unsigned in zip(node.output, moved.output, strict=True):
        rewriter.add("DequantizeLinear", [unsigned, "one", zero_point], name)
        rewriter.codes[name] = _Codes(unsigned, name, zero_point)


def _rewrite_layer(rewriter: _Rewriter, layer: NodeProto, multiply: NodeProto) -> None:
    weight = rewriter.constants[rewriter.producer[layer.input[1]].input[0]]
    bias = rewriter.constants[layer.input[2]] if len(layer.input) > 2 else np.zeros(weight.shape[0], np.float32)
    factor_name = next(name for name in multiply.input if name != layer.output[0])
    output = multiply.output[0]
    if layer.op_type == "Gemm":
        sums = _integer_sums(rewriter, layer, output, weight, bias)
    elif rewriter.quantizes_directly(output):
        factor = rewriter.constants[factor_name].reshape(-1).astype(np.float32)
        scale = rewriter.constant(f"{output}_scale", factor)
        _convolution(rewriter, layer, output, output, weight, bias * factor, scale)
        return
    else:
        one = rewriter.constant(f"{output}_scale", np.ones(len(weight), np.float32))
        _convolution(rewriter, layer, output, f"{output}_sums", weight, bias, one)
        # Bounds that no sum reaches. Without them the runtime multiplies the kernel by the factor, and rounds all sums.
        bounds = [rewriter.constant(name, np.array(b, np.float32)) for name, b in _BOUNDS.items()]
        sums = rewriter.add("Clip", [f"{output}_sums", *bounds], f"{output}_bounded")
    rewriter.add("Mul", [sums, factor_name], output)
    rewriter.initializers[factor_name] = rewriter.constants[factor_name]


def _convolution(
    rewriter: _Rewriter,
    layer: NodeProto,
    name: str,
    output: str,
    weight: NDArray[np.generic],
    bias: NDArray[np.floating],
    scale: str,
) -> None:
    kernel = rewriter.constant(f"{name}_weight", weight)
    # Stated, though all are 0, and for each layer its own: with session.x64quantprecision ONNX Runtime replaces them by
    # name, and can fail where it must add them.
    zeros = rewriter.constant(f"{name}_zero_points", np.zeros(len(weight), np.int8))
    values = rewriter.add("DequantizeLinear", [kernel, scale, zeros], f"{name}_kernel", axis=0)
    shift = rewriter.constant(f"{name}_bias", bias.astype(np.float32))
    attributes = {a.name: helper.get_attribute_value(a) for a in layer.attribute}
    rewriter.add("Conv", [rewriter.codes[layer.input[0]].values, values, shift], output, **attributes)


def _integer_sums(
    rewriter: _Rewriter, layer: NodeProto, name: str, weight: NDArray[np.generic], bias: NDArray[np.generic]
) -> str:
    codes = rewriter.codes[layer.input[0]]
    attributes = {a.name: helper.get_attribute_value(a) for a in layer.attribute}
    matrix = rewriter.constant(f"{name}_weight", np.ascontiguousarray(weight.T if attributes.get("transB") else weight))
    zero = rewriter.constant(f"{name}_zero_point", np.array(0, np.int8))
    sums = rewriter.add("MatMulInteger", [codes.unsigned, matrix, codes.zero_point, zero], f"{name}_sums")
    shift = rewriter.constant(f"{name}_bias", bias.reshape(1, -1).astype(np.float32))
    return rewriter.add(
        "Add", [rewriter.add("Cast", [sums], f"{name}_float", to=TensorProto.FLOAT), shift], f"{name}_biased"
    )


def _assemble(rewriter: _Rewriter, trt: onnx.ModelProto) -> onnx.ModelProto:
    made = {name for node in rewriter.nodes for name in node.output} | {value.name for value in trt.graph.input}
    for node in rewriter.nodes:
        for name in node.input:
            if name and name not in made and name not in rewriter.initializers:
                rewriter.initializers[name] = rewriter.constants[name]
    used = {name for node in rewriter.nodes for name in node.input}
    tensors = [numpy_helper.from_array(v, k) for k, v in rewriter.initializers.items() if k in used]
    graph = helper.make_graph(rewriter.nodes, trt.graph.name, trt.graph.input, trt.graph.output, tensors)
    model = helper.make_model(
        graph, opset_imports=trt.opset_import, ir_version=trt.ir_version, producer_name=trt.producer_name
    )
    onnx.checker.check_model(model, full_check=True)
    return model
