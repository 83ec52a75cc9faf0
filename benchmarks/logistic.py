"""The one operation of the integer form whose last bits differ between runtimes, made alike for exact comparisons."""

import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx

from services.quantizer.integer_modules import Sigmoid


def borrow_sigmoid(integer: fx.GraphModule) -> bool:
    """Let an integer form compute the logistic function as ONNX Runtime does; return whether it computes any."""
    modules = [module for module in integer.modules() if isinstance(module, Sigmoid)]
    if not modules:
        return False
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Sigmoid", ["x"], ["y"])], "sigmoid", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def sigmoid(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    for module in modules:
        module.forward = sigmoid  # type: ignore[method-assign]
    return True
