"""Rules for layers with weights and for activations."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from services.common.models import emitter
from services.common.models.emitter import Constant, Emitter
from services.common.models.registry import rule, shape_of


@rule(F.conv2d, torch.conv2d, "conv2d")
def _conv2d(
    emit: Emitter,
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not isinstance(weight, Constant):
        return emit.call(F.conv2d, x, weight, bias, stride, padding, dilation, groups)
    return emitter.conv2d(emit, x, weight, bias, stride, padding, dilation, groups)


@rule("convolution")
def _convolution(
    emit: Emitter,
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    if transposed or len(shape_of(x)) != 4:
        return emit.call(node.target, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    return _conv2d(emit, node, x, weight, bias, stride, padding, dilation, groups)


@rule(F.linear, "linear")
def _linear(emit: Emitter, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, Constant):
        return emit.call(F.linear, x, weight, bias)
    return emitter.linear(emit, x, weight, bias)


@rule("addmm", torch.addmm)
def _addmm(emit: Emitter, node: fx.Node, bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if not isinstance(weight, Constant) or not isinstance(bias, Constant) or beta != 1 or alpha != 1:
        return emit.call(torch.addmm, bias, x, weight, beta=beta, alpha=alpha)
    return emitter.linear(emit, x, Constant(weight.tensor.t(), weight.fqn), bias)


@rule("mm", "matmul", torch.mm, torch.matmul, operator.matmul, methods=("mm", "matmul"))
def _matmul(emit: Emitter, node: fx.Node, x: Any, weight: Any) -> Any:
    if not isinstance(weight, Constant) or weight.tensor.dim() != 2 or not isinstance(x, fx.Node):
        return emit.call(torch.matmul, x, weight)
    return emitter.linear(emit, x, Constant(weight.tensor.t(), weight.fqn), None)


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit")
def _batch_norm(
    emit: Emitter,
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> Any:
    # Exported in training mode or not: here it is used with its running statistics.
    result = emitter.batch_norm(emit, x, weight, bias, mean, var, eps, len(shape_of(x)))
    single = node.target is torch.ops.aten.batch_norm.default
    return result if single else (result, None, None)


@rule("_native_batch_norm_legit_no_training")
def _batch_norm_inference(
    emit: Emitter, node: fx.Node, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Any:
    return emitter.batch_norm(emit, x, weight, bias, mean, var, eps, len(shape_of(x))), None, None


@rule(F.batch_norm)
def _functional_batch_norm(
    emit: Emitter,
    node: fx.Node,
    x: Any,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    return emitter.batch_norm(emit, x, weight, bias, mean, var, eps, len(shape_of(x)))


def _activation(make: Callable[[], nn.Module], *targets: Any, methods: tuple[str, ...] = ()) -> None:
    @rule(*targets, methods=methods)
    def _rule(emit: Emitter, node: fx.Node, x: Any, inplace: bool = False) -> Any:
        return emit.module(make(), x)


_activation(nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", methods=("relu", "relu_"))
_activation(nn.ReLU6, F.relu6, "relu6", "relu6_")
_activation(nn.SiLU, F.silu, "silu", "silu_")
_activation(nn.Hardswish, F.hardswish, "hardswish", "hardswish_")
_activation(nn.Hardsigmoid, F.hardsigmoid, "hardsigmoid", "hardsigmoid_")
_activation(nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_", methods=("sigmoid", "sigmoid_"))
_activation(nn.Tanh, F.tanh, torch.tanh, "tanh", "tanh_", methods=("tanh", "tanh_"))
_activation(nn.Mish, F.mish, "mish", "mish_")


@rule(F.gelu, "gelu")
def _gelu(emit: Emitter, node: fx.Node, x: Any, approximate: str = "none") -> Any:
    return emit.module(nn.GELU(approximate), x)


@rule(F.leaky_relu, "leaky_relu", "leaky_relu_")
def _leaky_relu(emit: Emitter, node: fx.Node, x: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return emit.module(nn.LeakyReLU(negative_slope), x)


@rule(F.hardtanh, "hardtanh", "hardtanh_")
def _hardtanh(
    emit: Emitter, node: fx.Node, x: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Any:
    return _clamp(emit, node, x, min_val, max_val)


@rule(torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_", methods=("clamp", "clamp_", "clip", "clip_"))
def _clamp(emit: Emitter, node: fx.Node, x: Any, min: Any = None, max: Any = None) -> Any:
    previous = emit.source_module(x)
    if min == 0 and max == 6:
        return emit.module(nn.ReLU6(), x)
    if min == 0 and max is None:
        return emit.module(nn.ReLU(), x)
    if min is None and max == 6 and isinstance(previous, nn.ReLU):
        return emit.module(nn.ReLU6(), x.args[0])
    return emit.call(torch.clamp, x, min, max)


@rule("clamp_min", "clamp_min_", methods=("clamp_min", "clamp_min_"))
def _clamp_min(emit: Emitter, node: fx.Node, x: Any, min: Any) -> Any:
    return _clamp(emit, node, x, min, None)


@rule("clamp_max", "clamp_max_", methods=("clamp_max", "clamp_max_"))
def _clamp_max(emit: Emitter, node: fx.Node, x: Any, max: Any) -> Any:
    return _clamp(emit, node, x, None, max)


@rule(modules=(nn.Conv2d,))
def _conv2d_module(emit: Emitter, node: fx.Node, module: nn.Conv2d, x: Any) -> Any:
    return emitter.padded_conv2d(emit, x, module, str(node.target))


@rule(modules=(nn.BatchNorm2d,))
def _batch_norm_module(emit: Emitter, node: fx.Node, module: nn.BatchNorm2d, x: Any) -> Any:
    def constant(attribute: str) -> Constant | None:
        value = getattr(module, attribute)
        return None if value is None else Constant(value, f"{node.target}.{attribute}")

    weight, bias = constant("weight"), constant("bias")
    return emitter.batch_norm(
        emit, x, weight, bias, constant("running_mean"), constant("running_var"), module.eps, rank=4
    )


@rule(modules=(nn.Hardtanh,))
def _hardtanh_module(emit: Emitter, node: fx.Node, module: nn.Hardtanh, x: Any) -> Any:
    return _clamp(emit, node, x, module.min_val, module.max_val)
