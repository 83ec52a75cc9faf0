"""Rules for pooling, reshaping, arithmetic, and operations that do nothing in inference."""

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from services.common.models import emitter
from services.common.models.emitter import Emitter
from services.common.models.registry import rule, shape_of


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


@rule(F.pad, "pad", "constant_pad_nd")
def _pad(emit: Emitter, node: fx.Node, x: Any, pad: Any, mode: Any = "constant", value: Any = None) -> Any:
    if not isinstance(mode, str):  # constant_pad_nd has no mode
        mode, value = "constant", mode
    return emit.call(F.pad, x, list(pad), mode, *([float(value or 0)] if mode == "constant" else []))


@rule(modules=(nn.ZeroPad2d, nn.ConstantPad2d))
def _pad_module(emit: Emitter, node: fx.Node, module: nn.ConstantPad2d, x: Any) -> Any:
    return _pad(emit, node, x, module.padding, "constant", module.value)


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
