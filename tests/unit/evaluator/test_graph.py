from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from services.common.errors import InvalidArgumentError
from services.evaluator.graph import load_graph
from tests.support.onnx_graphs import quantized, saved


def test_reads_the_classifier(tmp_path: Path) -> None:
    graph = load_graph(saved(tmp_path, "m", quantized()), "onnx_trt")
    assert (graph.input_name, graph.input_shape, graph.output_name, graph.num_classes) == (
        "images",
        (3, 8, 8),
        "logits",
        5,
    )
    assert [(n.name, n.kind, n.weight_shape, n.int8_weight, n.per_channel_activation) for n in graph.layers] == [
        ("conv1_sums", "Conv", (16, 3, 3, 3), True, False),
        ("conv2_sums", "Conv", (16, 16, 3, 3), True, False),
        ("logits_sums", "Gemm", (5, 16), True, False),
    ]


def test_sees_what_no_integer_kernel_can_run(tmp_path: Path) -> None:
    graph = load_graph(saved(tmp_path, "m", quantized(channel_scales=True, float_weights=("conv2",))), "f")
    assert [n.per_channel_activation for n in graph.layers] == [True, True, False]
    assert [n.int8_weight for n in graph.layers] == [True, False, True]


def changed(change: str) -> onnx.ModelProto:
    model = quantized()
    graph = model.graph
    match change:
        case "fixed batch":
            graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
        case "rank":
            del graph.input[0].type.tensor_type.shape.dim[3]
        case "type":
            graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
        case "output":
            graph.output[0].type.tensor_type.shape.dim[1].dim_param = "K"
        case "inputs":
            graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
        case "external":
            tensor = next(t for t in graph.initializer if t.name == "conv1_codes")
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="/etc/passwd")
        case "external in a node":
            tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
            tensor.external_data.add(key="location", value="../x")
            graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
        case "external in a branch":
            tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
            tensor.external_data.add(key="location", value="../x")
            branch = helper.make_graph([], "b", [], [], [tensor])
            graph.node.append(helper.make_node("If", ["one"], ["c"], then_branch=branch, else_branch=branch))
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fixed batch", "fixed at 4"),
        ("rank", "N×C×H×W"),
        ("type", "float32"),
        ("output", "K fixed"),
        ("inputs", "2 inputs"),
        ("external", "other files"),
        ("external in a node", "other files"),
        ("external in a branch", "other files"),
    ],
)
def test_refuses(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        load_graph(saved(tmp_path, "m", changed(change)), "onnx_ort")
    assert caught.value.field == "onnx_ort"


def test_refuses_damaged_files(tmp_path: Path) -> None:
    intact = quantized().SerializeToString()
    random = np.random.default_rng(0)
    for content in (b"", b"not onnx", intact[:100], intact[: len(intact) // 2], random.bytes(1000)):
        path = tmp_path / "m.onnx"
        path.write_bytes(content)
        with pytest.raises(InvalidArgumentError):
            load_graph(path, "onnx_float")
