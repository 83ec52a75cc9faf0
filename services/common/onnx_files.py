"""ONNX files from outside: parsed without a look at anything but their own bytes."""

from collections.abc import Iterable, Iterator
from itertools import chain

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from services.common.errors import InvalidArgumentError


def parse_onnx(data: bytes, field: str) -> onnx.ModelProto:
    """Return the model in the bytes of an ONNX file.

    Args:
        data: The file's content.
        field: What named it, for errors.

    Raises:
        InvalidArgumentError: The file is damaged, or refers to other files.
    """
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError) as error:
        raise InvalidArgumentError(f"not a readable ONNX file: {error}", field=field) from error
    inner = (_tensors_of(function.node) for function in model.functions)
    if any(t.data_location == TensorProto.EXTERNAL or t.external_data for t in chain(_tensors(model.graph), *inner)):
        # The runtimes would open whatever path the file names.
        raise InvalidArgumentError("the ONNX file keeps weights in other files; save it as one file", field=field)
    return model


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield all tensors of a graph, also those in attributes and in graphs within it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of(graph.node)


def _tensors_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from attribute.tensors
        for sparse in attribute.sparse_tensors:
            yield from (sparse.values, sparse.indices)
        if attribute.HasField("t"):
            yield attribute.t
        if attribute.HasField("sparse_tensor"):
            yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
        for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            yield from _tensors(inner)
