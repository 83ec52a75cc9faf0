"""Small operations on the module-level torch.fx graph that model intake returns (one node form per operation)."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from services.quantizer.moments import Moments

LAYER_TYPES = (nn.Conv2d, nn.Linear)
BATCH_NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d)
# Operations that keep the sign of their input and a common positive factor of each channel.
_SIGN_KEEPING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
_REARRANGEMENTS = (torch.cat, torch.chunk, torch.split, operator.getitem, torch.reshape, torch.transpose, torch.permute)
_NON_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid)


def module_of(graph_module: fx.GraphModule, node: Any) -> nn.Module | None:
    """Return the module that ``node`` calls, or None when it calls none."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return graph_module.get_submodule(str(node.target))
    return None


def layers(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Conv2d | nn.Linear]]:
    """Yield each convolution and linear layer with its node, in order of execution."""
    for node in graph_module.graph.nodes:
        module = module_of(graph_module, node)
        if isinstance(module, LAYER_TYPES):
            yield node, module


def input_of(node: fx.Node) -> fx.Node:
    """Return the first argument of ``node``, a tensor."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        raise TypeError(f"{node.name} reads no tensor")
    return source


def comes_from_image(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether no layer lies between the image and ``node``: it is the image, perhaps normalized, cropped or padded."""
    stack, seen = [node], {node}
    while stack:
        above = stack.pop()
        if isinstance(module_of(graph_module, above), LAYER_TYPES):
            return False
        new = [source for source in above.all_input_nodes if source not in seen]
        seen.update(new)
        stack += new
    return True


def rearranges(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` does nothing but move values: then it can move their codes instead.

    A pooling by maximum behind a concatenation counts too, because it takes the same values from codes, and so does a
    padding with zeros, whose codes are 0.
    """
    if node.target is F.pad:
        around: Any = node.args[1]
        rank = len(node.meta["tensor_meta"].shape)
        return rank == 4 and len(around) <= 4 and min(around) >= 0 and tuple(node.args[2:]) == ("constant", 0.0)
    if node.op == "call_function":
        return node.target in _REARRANGEMENTS
    module = module_of(graph_module, node)
    return isinstance(module, nn.ChannelShuffle) or (
        isinstance(module, nn.MaxPool2d) and rearranges(graph_module, input_of(node))
    )


def is_non_negative(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the values of ``node`` can never be below zero, whatever the input of the model."""
    module = module_of(graph_module, node)
    if isinstance(module, _NON_NEGATIVE):
        return True
    if isinstance(module, _SIGN_KEEPING):
        return is_non_negative(graph_module, input_of(node))
    if node.op == "call_function" and node.target in (operator.add, operator.mul):
        return all(
            is_non_negative(graph_module, a) if isinstance(a, fx.Node) else isinstance(a, (int, float)) and a >= 0
            for a in node.args
        )
    if rearranges(graph_module, node):
        return all(is_non_negative(graph_module, above) for above in node.all_input_nodes)
    return False


def ceiling_of(graph_module: fx.GraphModule, node: fx.Node) -> float | None:
    """Return 6 when ``node`` is a ReLU6, perhaps pooled or flattened, else None."""
    module = module_of(graph_module, node)
    if isinstance(module, nn.ReLU6):
        return 6.0
    if isinstance(module, _SIGN_KEEPING):
        return ceiling_of(graph_module, input_of(node))
    return None


def channels_of(node: fx.Node) -> int:
    """Return the length of axis 1 of the tensor that ``node`` makes, from the shapes recorded at capture."""
    return int(node.meta["tensor_meta"].shape[1])


def insert_module(
    graph_module: fx.GraphModule, after: fx.Node, source: fx.Node, name: str, module: nn.Module
) -> fx.Node:
    """Register ``module`` as ``name`` and call it on ``source`` right after node ``after``; return the new node.

    Where ``name`` is taken, underscores make it free.
    """
    while hasattr(graph_module, name):
        name += "_"
    graph_module.add_submodule(name, module)
    with graph_module.graph.inserting_after(after):
        node = graph_module.graph.call_module(name, (source,))
    if "tensor_meta" in source.meta:
        node.meta["tensor_meta"] = source.meta["tensor_meta"]
    return node


def set_module(graph_module: fx.GraphModule, name: str, module: nn.Module) -> None:
    """Replace the module called ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(graph_module.get_submodule(parent), leaf, module)


def fold_batch_norms(graph_module: fx.GraphModule) -> dict[fx.Node, Moments]:
    """Fold each BatchNorm that directly follows a layer it alone reads into that layer's weight and bias, in place.

    With γ, β, μ, σ² frozen, BN(W∗x + b) = (W·γ/√(σ²+ε))∗x + (b − μ)·γ/√(σ²+ε) + β. A BatchNorm that follows anything
    else (a concatenation, a sum) stays as it is, in evaluation mode.

    Returns:
        The nodes of the layers whose output is now a BatchNorm's, each with the moments of that.
    """
    folded: dict[fx.Node, Moments] = {}
    for node in list(graph_module.graph.nodes):
        norm = module_of(graph_module, node)
        if not isinstance(norm, BATCH_NORM_TYPES):
            continue
        source = input_of(node)
        layer = module_of(graph_module, source)
        if not isinstance(layer, LAYER_TYPES) or len(source.users) != 1:
            continue
        factor, shift = batch_norm_affine(norm)
        bias = layer.bias.detach().double() if layer.bias is not None else torch.zeros_like(shift)
        weight = layer.weight.detach().double() * factor.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.weight = nn.Parameter(weight.float())
        layer.bias = nn.Parameter((bias * factor + shift).float())
        node.replace_all_uses_with(source)
        graph_module.graph.erase_node(node)
        folded[source] = Moments.behind(norm)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return folded


def batch_norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return factor and shift, C float64 each, that a BatchNorm in evaluation mode applies.

    Raises:
        ValueError: it has no running statistics.
    """
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("a BatchNorm has no running statistics")
    factor = (var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = norm.bias.detach().double() if norm.bias is not None else torch.zeros_like(factor)
    return factor, shift - mean.double() * factor
