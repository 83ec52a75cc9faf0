"""Writes ONNX files: the float model, and the integer form in the flavour that TensorRT reads.

TensorRT runs a layer in INT8 when both its operands come from DequantizeLinear with zero point 0, the activation's
with one scale for the tensor, the weight's on axis 0. Here both scales are 1, because the operands *are* the codes;
the layer's real scale is the multiply behind it:

    [Mul 1/s] → [Pad] → Clip(lo, hi) → QuantizeLinear(1, int8 0) → DequantizeLinear ┐
                                      int8 weight → DequantizeLinear(1, axis 0) ────┴ Conv(+ bias codes) → Mul(factor)

A padding stands there, an image's in front of the Mul, where another code than 0 is the value 0
(``learned.CodeRange``); convolutions pad with 0 alone.

Run without graph optimizations this file computes exactly what ``integer.py`` computes, bit for bit.
"""

import logging
import warnings
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxscript import opset21 as op
from torch import fx, nn

OPSET = 21
INPUT, OUTPUT = "images", "logits"


def _constant(value: Any, dtype: str) -> Any:
    return op.Constant(value=numpy_helper.from_array(np.asarray(value, dtype)))


def _codes(x: Any, lo: int, hi: int) -> Any:
    if (lo, hi) != (-128, 127):  # QuantizeLinear itself saturates there
        x = op.Clip(x, _constant(lo, "float32"), _constant(hi, "float32"))
    one, zero = _constant(1, "float32"), _constant(0, "int8")
    codes: Any = op.QuantizeLinear(x, one, zero)
    return op.DequantizeLinear(codes, one, zero)


def _weight(codes: Any) -> Any:
    return op.DequantizeLinear(codes, _constant(np.ones(codes.shape[0]), "float32"), axis=0)


def _export(module: nn.Module, input_shape: tuple[int, int, int], table: dict[Any, Any]) -> onnx.ModelProto:
    example = torch.zeros(2, *input_shape)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's notices about its own future say nothing about this model
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            custom_translation_table=table,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("the ONNX exporter returned nothing")
    model: onnx.ModelProto = program.model_proto
    _strip_provenance(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def _strip_provenance(model: onnx.ModelProto) -> None:
    """Remove the stack traces and source paths that the exporter keeps in metadata; they are not for shipping."""
    del model.graph.metadata_props[:]
    part: Any
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
    for node in model.graph.node:
        node.ClearField("doc_string")


def export_float(model: fx.GraphModule, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """Return the ONNX of a float model, image (C, H, W) with a free batch axis.

    Raises:
        RuntimeError: the exporter cannot express the model.
    """
    return _export(model, input_shape, {})


def export_trt(integer: fx.GraphModule, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """Return the integer form as ONNX with int8 codes, for TensorRT and for the bit-exact check.

    Raises:
        RuntimeError: the exporter cannot express the model.
    """
    table = {torch.ops.granq.codes.default: _codes, torch.ops.granq.weight.default: _weight}
    return _export(integer, input_shape, table)
