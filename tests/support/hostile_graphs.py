"""Makes of the graph of `onnx_graphs.quantized` a file that no engine must be built from."""

import onnx

from tests.support.onnx_graphs import quantized


def truncated(model: onnx.ModelProto) -> bytes:
    """Cut the end off."""
    return model.SerializeToString()[:-100]


def unknown(model: onnx.ModelProto) -> bytes:
    """Have the graph use an operation that nobody knows."""
    next(node for node in model.graph.node if node.op_type == "GlobalAveragePool").op_type = "NoSuchOperation"
    return model.SerializeToString()


def outside(model: onnx.ModelProto) -> bytes:
    """Have a weight lie in a file beyond the folder."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "conv1_codes")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return model.SerializeToString()


def float_weights(_model: onnx.ModelProto) -> bytes:
    """Leave one convolution's weights in float."""
    return quantized(float_weights=("conv2",)).SerializeToString()
