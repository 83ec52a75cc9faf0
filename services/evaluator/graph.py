"""What an ONNX file says about itself, before any runtime sees it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from services.common.errors import InvalidArgumentError
from services.common.onnx_files import parse_onnx

LAYER_KINDS = frozenset({"Conv", "Gemm", "MatMul"})
# Operations that change neither the values nor the number format of what they pass on.
_TRANSPARENT = frozenset({"Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer with constant weights.

    Attributes:
        name: The node's name, or that of its output where it has none.
        kind: "Conv", "Gemm" or "MatMul".
        weight_shape: Shape of the weight as stored.
        int8_weight: Whether the weight is stored as INT8 codes behind a DequantizeLinear.
        per_channel_activation: Whether the input is dequantized with one scale per channel, which no integer kernel
            can run.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    int8_weight: bool
    per_channel_activation: bool


@dataclass(frozen=True)
class Graph:
    """A classifier in ONNX: one image batch in, one batch of logits out.

    Attributes:
        model: The parsed file.
        input_name: Name of the float32 input, N×C×H×W.
        input_shape: Channels, height and width.
        output_name: Name of the float32 output, N×K.
        num_classes: K.
        layers: Convolution and linear layers with constant weights, in stored order.
    """

    model: onnx.ModelProto
    input_name: str
    input_shape: tuple[int, int, int]
    output_name: str
    num_classes: int
    layers: tuple[Layer, ...]


def load_graph(path: Path, field: str) -> Graph:
    """Parse an ONNX file and check that it is a self-contained classifier with a free batch axis.

    Args:
        path: The file.
        field: Request field that named it, for errors.

    Raises:
        InvalidArgumentError: The file is damaged, refers to other files, or has other inputs and outputs.
    """
    model = parse_onnx(path.read_bytes(), field)
    constants = {t.name for t in model.graph.initializer}
    inputs = [v for v in model.graph.input if v.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise InvalidArgumentError(
            f"the graph has {len(inputs)} inputs and {len(model.graph.output)} outputs; a classifier has one of each",
            field=field,
        )
    source, target = inputs[0], model.graph.output[0]
    shape, logits = _dims(source), _dims(target)
    if not _is_float(source) or len(shape) != 4 or min(shape[1:]) < 1:
        raise InvalidArgumentError(f"input {source.name!r} must be float32 N×C×H×W, C, H and W fixed", field=field)
    if not _is_float(target) or len(logits) != 2 or logits[1] < 1:
        raise InvalidArgumentError(f"output {target.name!r} must be float32 N×K, K fixed", field=field)
    if shape[0] != -1:
        raise InvalidArgumentError(
            f"the batch axis of input {source.name!r} is fixed at {shape[0]}; export it as a dynamic axis", field=field
        )
    size = (shape[1], shape[2], shape[3])
    return Graph(model, source.name, size, target.name, logits[1], tuple(_layers(model.graph)))


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == TensorProto.FLOAT)


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    """Return the axes' lengths, −1 for a free one."""
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else -1 for d in dims]


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return the graph's constant tensors by name: initializers and outputs of Constant nodes."""
    found = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return found


def _layers(graph: onnx.GraphProto) -> Iterator[Layer]:
    constants = constants_of(graph)
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type not in LAYER_KINDS:
            continue
        dequantize = _dequantizer(node.input[1], producers)
        stored = constants.get(dequantize.input[0] if dequantize else _origin(node.input[1], producers))
        if stored is None:
            continue
        feeder = _dequantizer(node.input[0], producers)
        scale = constants.get(feeder.input[1]) if feeder else None
        yield Layer(
            name=node.name or node.output[0],
            kind=node.op_type,
            weight_shape=tuple(stored.dims),
            int8_weight=dequantize is not None and stored.data_type == TensorProto.INT8,
            per_channel_activation=scale is not None and len(scale.dims) == 1 and scale.dims[0] > 1,
        )


def _origin(name: str, producers: dict[str, onnx.NodeProto]) -> str:
    while (node := producers.get(name)) is not None and node.op_type in _TRANSPARENT:
        name = node.input[0]
    return name


def _dequantizer(name: str, producers: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    node = producers.get(_origin(name, producers))
    return node if node is not None and node.op_type == "DequantizeLinear" else None
