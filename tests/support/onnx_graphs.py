"""Small quantized classifiers in ONNX, made node by node: what the exporter writes, without torch.

Input 3×8×8 with integer codes as values, two 3×3 convolutions, a global average, a linear layer, 5 classes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CHANNELS, CLASSES, SIDE = 16, 5, 8
OPSET = 21


@dataclass
class Builder:
    """Collects the nodes and constants of one graph.

    Attributes:
        unsigned: Carry codes as the onnx_ort form does: unsigned bytes, scales within DequantizeLinear, clipped after
            quantization. Otherwise as the onnx_trt form does: signed bytes, codes dequantized by 1, an explicit scale.
        low: Smallest code.
        high: Largest code.
        channel_scales: Quantize the convolutions' inputs with one scale per channel, which integer kernels cannot run.
        float_weights: Names of layers whose weights stay in float.
        largest_weight: Weights are drawn from ± this.
        two_bits: Weights are drawn from −3, −1, 1 and 3 instead.
    """

    unsigned: bool = False
    low: int = 0
    high: int = 127
    channel_scales: bool = False
    float_weights: tuple[str, ...] = ()
    largest_weight: int = 127
    two_bits: bool = False
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def activation(self, source: str, name: str, channels: int | None) -> str:
        one = self.constant("one", np.float32(1))
        if self.unsigned:
            zero_code = 128 if self.low < 0 else 0
            zero = self.constant("zero", np.uint8(zero_code))
            codes = self.add("QuantizeLinear", [source, one, zero], f"{name}_codes")
            if (self.low + zero_code, self.high + zero_code) != (0, 255):
                low = self.constant("low", np.uint8(self.low + zero_code))
                high = self.constant("high", np.uint8(self.high + zero_code))
                codes = self.add("Clip", [codes, low, high], f"{name}_clipped")
            return self.add("DequantizeLinear", [codes, one, zero], name)
        low, high = self.constant("low", np.float32(self.low)), self.constant("high", np.float32(self.high))
        clipped = self.add("Clip", [source, low, high], f"{name}_clipped")
        axis: dict[str, object] = {}
        zero = self.constant("zero", np.int8(0))
        if self.channel_scales and channels:
            axis = {"axis": 1}
            one = self.constant(f"ones{channels}", np.ones(channels, np.float32))
            zero = self.constant(f"zeros{channels}", np.zeros(channels, np.int8))
        codes = self.add("QuantizeLinear", [clipped, one, zero], f"{name}_codes", **axis)
        return self.add("DequantizeLinear", [codes, one, zero], name, **axis)

    def layer(self, kind: str, source: str, name: str, shape: tuple[int, ...], **attributes: Any) -> str:
        """Add a layer with integer weights and biases, and its output scale."""
        random = np.random.default_rng([self.seed, *name.encode()])
        most = 3 if self.two_bits else self.largest_weight
        drawn = random.integers(-2, 2, shape) * 2 + 1 if self.two_bits else random.integers(-most, most + 1, shape)
        weight = drawn.astype(np.int8)
        bias = random.integers(-1000, 1000, shape[0]).astype(np.float32)
        # Brings a sum of products back to the range of codes.
        spread = most * np.sqrt(np.prod(shape[1:]))
        scale = (random.uniform(0.5, 1.5, shape[0]) / spread).astype(np.float32)
        in_dequantize = scale if self.unsigned else np.ones(shape[0], np.float32)
        if name in self.float_weights:
            factor = in_dequantize.reshape(-1, *[1] * (len(shape) - 1))
            kernel = self.constant(f"{name}_weight", weight.astype(np.float32) * factor)
        else:
            codes, scales = self.constant(f"{name}_codes", weight), self.constant(f"{name}_scales", in_dequantize)
            kernel = self.add("DequantizeLinear", [codes, scales], f"{name}_weight", axis=0)
        bias_name = self.constant(f"{name}_bias", bias * in_dequantize)
        if self.unsigned:
            return self.add(kind, [source, kernel, bias_name], name, **attributes)
        sums = self.add(kind, [source, kernel, bias_name], f"{name}_sums", **attributes)
        shaped = scale.reshape(1, -1, *[1] * (len(shape) - 2))
        return self.add("Mul", [sums, self.constant(f"{name}_factor", shaped)], name)

    def model(self) -> onnx.ModelProto:
        """Return the whole classifier."""
        conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        x = self.activation("images", "act1", 3)
        x = self.layer("Conv", x, "conv1", (CHANNELS, 3, 3, 3), **conv)
        x = self.activation(x, "act2", CHANNELS)
        x = self.layer("Conv", x, "conv2", (CHANNELS, CHANNELS, 3, 3), **conv)
        x = self.activation(x, "act3", CHANNELS)
        x = self.add("GlobalAveragePool", [x], "pooled")
        x = self.add("Flatten", [x], "flat")
        x = self.activation(x, "act4", None)
        self.layer("Gemm", x, "logits", (CLASSES, CHANNELS), transB=1)
        return make_model(self.nodes, self.constants)


def convolutions() -> onnx.ModelProto:
    """Return a classifier of convolutions alone: two, the second one in place of a linear layer."""
    builder = Builder()
    x = builder.activation("images", "act1", 3)
    x = builder.layer("Conv", x, "conv1", (CHANNELS, 3, 3, 3), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    x = builder.activation(x, "act2", CHANNELS)
    x = builder.activation(builder.add("GlobalAveragePool", [x], "pooled"), "act3", CHANNELS)
    x = builder.layer("Conv", x, "head", (CLASSES, CHANNELS, 1, 1), kernel_shape=[1, 1])
    builder.add("Flatten", [x], "logits")
    return make_model(builder.nodes, builder.constants)


def make_model(nodes: list[onnx.NodeProto], constants: dict[str, NDArray[np.generic]]) -> onnx.ModelProto:
    """Return a checked classifier from "images" to "logits" with a free batch axis."""
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def quantized(**options: object) -> onnx.ModelProto:
    """Return a classifier; the options are Builder's."""
    return Builder(**options).model()  # type: ignore[arg-type]


def saved(folder: Path, name: str, model: onnx.ModelProto) -> Path:
    """Write a model and return its path."""
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def images(count: int, seed: int = 0, low: float = 0.0, high: float = 127.0) -> NDArray[np.float32]:
    """Return random inputs."""
    random = np.random.default_rng(seed)
    return random.uniform(low, high, (count, 3, SIDE, SIDE)).astype(np.float32)
