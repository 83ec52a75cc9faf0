"""Which operation becomes which node: one rule per operation, found by function, method, ATen operator or module type.

A rule gets the emitter, the raw node and its arguments, in which tensors are nodes of the new graph or constants. It
returns a node of the new graph, a constant, a number, or a tuple of these.
"""

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn import functional as F

from services.common.models import emitter
from services.common.models.emitter import Constant, Emitter

Rule = Callable[..., Any]
FUNCTIONS: Final[dict[Any, Rule]] = {}
METHODS: Final[dict[str, Rule]] = {}
MODULES: Final[dict[type[nn.Module], Rule]] = {}


def rule(
    *targets: Any, methods: tuple[str, ...] = (), modules: tuple[type[nn.Module], ...] = ()
) -> Callable[[Rule], Rule]:
    """Register a rule. A string among the targets names an ATen operator, all overloads."""

    def register(function: Rule) -> Rule:
        for target in targets:
            FUNCTIONS[target] = function
        for method in methods:
            METHODS[method] = function
        for module in modules:
            MODULES[module] = function
        return function

    return register


def shape_of(x: fx.Node) -> tuple[int, ...]:
    """Shape of a tensor of the new graph at the batch size of the propagation."""
    return tuple(x.meta["shape"])


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
def _clamp(emit: Emitter, node: fx.Node, x: Any, min: Any = None, max: Any = None) -> Any:  # noqa: A002
    previous = emit.source_module(x)
    if min == 0 and max == 6:
        return emit.module(nn.ReLU6(), x)
    if min == 0 and max is None:
        return emit.module(nn.ReLU(), x)
    if min is None and max == 6 and isinstance(previous, nn.ReLU):
        return emit.module(nn.ReLU6(), x.args[0])
    return emit.call(torch.clamp, x, min, max)


@rule("clamp_min", "clamp_min_", methods=("clamp_min", "clamp_min_"))
def _clamp_min(emit: Emitter, node: fx.Node, x: Any, min: Any) -> Any:  # noqa: A002
    return _clamp(emit, node, x, min, None)


@rule("clamp_max", "clamp_max_", methods=("clamp_max", "clamp_max_"))
def _clamp_max(emit: Emitter, node: fx.Node, x: Any, max: Any) -> Any:  # noqa: A002
    return _clamp(emit, node, x, None, max)


@rule(F.max_pool2d, torch.max_pool2d, "max_pool2d", "max_pool2d_with_indices")
def _max_pool2d(
    emit: Emitter,
    node: fx.Node,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    result = emit.module(nn.MaxPool2d(kernel_size, stride or None, padding, dilation, ceil_mode=ceil_mode), x)
    return (result, None) if node.target is torch.ops.aten.max_pool2d_with_indices.default else result


@rule(F.avg_pool2d, "avg_pool2d")
def _avg_pool2d(
    emit: Emitter,
    node: fx.Node,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    kernel = emitter.pair(kernel_size)
    if kernel == shape_of(x)[2:] and emitter.pair(padding) == (0, 0) and not divisor_override:
        return emit.module(nn.AdaptiveAvgPool2d(1), x)
    return emit.module(nn.AvgPool2d(kernel, stride or None, padding, ceil_mode, count_include_pad, divisor_override), x)


@rule(F.adaptive_avg_pool2d, "adaptive_avg_pool2d", "_adaptive_avg_pool2d")
def _adaptive_avg_pool2d(emit: Emitter, node: fx.Node, x: Any, output_size: Any) -> Any:
    height, width = shape_of(x)[2:]
    given = (output_size, output_size) if isinstance(output_size, int) or output_size is None else tuple(output_size)
    size = (given[0] or height, given[1] or width)
    if size == (height, width):
        return x
    return emit.module(nn.AdaptiveAvgPool2d(1 if size == (1, 1) else size), x)


@rule(F.adaptive_max_pool2d, "adaptive_max_pool2d")
def _adaptive_max_pool2d(emit: Emitter, node: fx.Node, x: Any, output_size: Any, return_indices: bool = False) -> Any:
    result = emit.module(nn.AdaptiveMaxPool2d(output_size), x)
    return (result, None) if isinstance(node.target, torch._ops.OpOverload) else result


@rule(torch.mean, "mean", methods=("mean",))
def _mean(emit: Emitter, node: fx.Node, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    rank = len(shape_of(x))
    axes = sorted(axis % rank for axis in ([dim] if isinstance(dim, int) else dim or range(rank)))
    if rank != 4 or axes != [2, 3]:
        return emit.call(torch.mean, x, axes, keepdim)
    pooled = emit.module(nn.AdaptiveAvgPool2d(1), x)
    return pooled if keepdim else emit.module(nn.Flatten(1), pooled)


@rule(
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    "flatten",
    "view",
    "_unsafe_view",
    "reshape",
    "squeeze",
    "unflatten",
    methods=("flatten", "view", "reshape", "squeeze", "unflatten"),
)
def _reshape(emit: Emitter, node: fx.Node, x: Any, *_: Any, **__: Any) -> Any:
    """The result's shape, found by propagation at two batch sizes, says all."""
    before = shape_of(x)
    result: tuple[int, ...] = node.meta["static_shape"]
    if before == tuple(node.meta["shape"]):
        return x
    if len(result) == 2 and result[0] == -1 and node.meta["shape"][0] == before[0]:
        return emit.module(nn.Flatten(1), x)
    return emit.call(torch.reshape, x, result)


@rule(
    F.dropout,
    F.dropout2d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    "dropout",
    "dropout_",
    "feature_dropout",
    "contiguous",
    "clone",
    "detach",
    "detach_",
    "alias",
    "lift_fresh_copy",
    "native_dropout",
    torch.clone,
    methods=("contiguous", "clone", "detach", "requires_grad_"),
)
def _identity(emit: Emitter, node: fx.Node, x: Any, *_: Any, **__: Any) -> Any:
    return (x, None) if node.target is torch.ops.aten.native_dropout.default else x


@rule("to", "_to_copy", methods=("to", "float"))
def _to(emit: Emitter, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
    # Float32 throughout is checked at the end; moves between devices and layouts mean nothing here.
    return x if node.meta.get("dtype") == torch.float32 else emit.call(node.target, x, *args, **kwargs)


def _binary(function: Any, *targets: Any, methods: tuple[str, ...]) -> None:
    @rule(function, *targets, methods=methods)
    def _rule(emit: Emitter, node: fx.Node, a: Any, b: Any, *, alpha: float = 1) -> Any:
        return emitter.binary(emit, function, a, b if alpha == 1 else emit.call(operator.mul, b, alpha))


_binary(operator.add, operator.iadd, torch.add, "add", "add_", methods=("add", "add_"))
_binary(operator.sub, operator.isub, torch.sub, "sub", "sub_", methods=("sub", "sub_"))
_binary(operator.mul, operator.imul, torch.mul, "mul", "mul_", methods=("mul", "mul_"))
_binary(operator.truediv, operator.itruediv, torch.div, methods=("div", "div_"))


@rule("div", "div_")
def _div(emit: Emitter, node: fx.Node, a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return emit.call(torch.div, a, b, rounding_mode=rounding_mode)
    return emitter.binary(emit, operator.truediv, a, b)


@rule(torch.cat, torch.concat, "cat", "concat")
def _cat(emit: Emitter, node: fx.Node, tensors: Any, dim: int = 0) -> Any:
    return emit.call(torch.cat, list(tensors), dim)


@rule(operator.getitem)
def _getitem(emit: Emitter, node: fx.Node, value: Any, index: Any) -> Any:
    return value[index] if isinstance(value, (tuple, list)) else emit.call(operator.getitem, value, index)


def _renamed(function: Any, *targets: str, methods: tuple[str, ...] = ()) -> None:
    @rule(*targets, methods=methods)
    def _rule(emit: Emitter, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        return emit.call(function, *args, **kwargs)


_renamed(torch.transpose, "transpose", methods=("transpose",))
_renamed(torch.permute, "permute", methods=())
_renamed(torch.chunk, "chunk", methods=("chunk",))
_renamed(torch.split, "split", "split_with_sizes", methods=("split",))
_renamed(torch.unsqueeze, "unsqueeze", methods=("unsqueeze",))


@rule(methods=("permute",))
def _permute(emit: Emitter, node: fx.Node, x: Any, *dims: Any) -> Any:
    return emit.call(torch.permute, x, dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims)


@rule(modules=(nn.Conv2d,))
def _conv2d_module(emit: Emitter, node: fx.Node, module: nn.Conv2d, x: Any) -> Any:
    return emitter.padded_conv2d(emit, x, module, str(node.target))


@rule(modules=(nn.BatchNorm2d,))
def _batch_norm_module(emit: Emitter, node: fx.Node, module: nn.BatchNorm2d, x: Any) -> Any:
    values = (module.weight, module.bias, module.running_mean, module.running_var)
    constants = [None if v is None else Constant(v, f"{node.target}.{index}") for index, v in enumerate(values)]
    return emitter.batch_norm(emit, x, *constants, module.eps, 4)  # type: ignore[misc]


@rule(modules=(nn.Hardtanh,))
def _hardtanh_module(emit: Emitter, node: fx.Node, module: nn.Hardtanh, x: Any) -> Any:
    return _clamp(emit, node, x, module.min_val, module.max_val)


@rule(modules=(nn.AvgPool2d,))
def _avg_pool2d_module(emit: Emitter, node: fx.Node, module: nn.AvgPool2d, x: Any) -> Any:
    return _avg_pool2d(
        emit,
        node,
        x,
        module.kernel_size,
        module.stride,
        module.padding,
        module.ceil_mode,
        module.count_include_pad,
        module.divisor_override,
    )


@rule(modules=(nn.AdaptiveAvgPool2d,))
def _adaptive_avg_pool2d_module(emit: Emitter, node: fx.Node, module: nn.AdaptiveAvgPool2d, x: Any) -> Any:
    return _adaptive_avg_pool2d(emit, node, x, module.output_size)


@rule(modules=(nn.Flatten, nn.Unflatten))
def _flatten_module(emit: Emitter, node: fx.Node, module: nn.Module, x: Any) -> Any:
    return _reshape(emit, node, x)


@rule(modules=(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout))
def _dropped_module(emit: Emitter, node: fx.Node, module: nn.Module, x: Any) -> Any:
    return x
