"""Finds the blocks of a network's graph that ``norms.py`` computes at once."""

import copy
import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from services.common.kernels.norms import Activation, fused, serves

_CAPS: Final = {nn.ReLU: Activation().cap, nn.ReLU6: 6.0}

Listener = Callable[[nn.BatchNorm2d, Tensor, Tensor], None]
"""Called with a BatchNorm and the mean and biased variance over the batch, C each, of what it read."""


class _Block(nn.Module):
    """The modules of a block, fused where that can be; they belong to the network and are no submodules of this."""

    def __init__(
        self, norms: list[nn.BatchNorm2d], tail: list[nn.Module], bits: int, copies: int, listener: Listener | None
    ) -> None:
        super().__init__()
        self._parts = (norms, tail)
        self._activation = Activation(_CAPS[type(tail[0])], bits)
        self._copies = copies
        self._listener = listener

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Return the block's output, twice where it has two readers."""
        norms, tail = self._parts
        # Whoever hooks a module wants its own output.
        if any(module._forward_hooks for module in (*norms, *tail)) or not serves(x, norms, shortcut):
            y = norms[0](x)
            if shortcut is not None:
                y = y + (norms[1](shortcut) if len(norms) > 1 else shortcut)
            for module in tail:
                y = module(y)
            results = [y] * self._copies
        else:
            results, statistics = fused(x, norms, shortcut, self._activation, self._copies)
            if self._listener is not None:
                for norm, (mean, variance) in zip(norms, statistics, strict=True):
                    self._listener(norm, mean, variance)
        return results[0] if self._copies == 1 else tuple(results)


class _FrozenConv2d(nn.Module):
    """A convolution whose parameters get no gradient, so that nobody needs its input once it has run."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self._conv = (conv,)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution's output."""
        (conv,) = self._conv
        weight, bias = conv.weight, conv.bias
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            narrow = torch.get_autocast_dtype(kind)
            x, weight, bias = x.to(narrow), weight.to(narrow), None if bias is None else bias.to(narrow)
        arguments = conv.stride, conv.padding, conv.dilation, conv.groups
        result: Tensor = _InputAlone.apply(x, weight, bias, *arguments)
        return result


class _InputAlone(torch.autograd.Function):
    """PyTorch's convolution keeps its input even where only the gradient by the input is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.like = x.shape, arguments
        return F.conv2d(x, weight, bias, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        shape, (stride, padding, dilation, groups) = ctx.like
        # Its values are not read, only its shape and layout.
        x = torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
        gradient, _, _ = torch.ops.aten.convolution_backward(
            *(grads[0], x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False])
        )
        return gradient, *[None] * 6


def fuse_blocks(
    model: fx.GraphModule,
    bits_of: Callable[[nn.Module], int | None] = lambda module: None,
    listener: Listener | None = None,
) -> fx.GraphModule:
    """Return a graph that computes what ``model`` does with its modules, in fewer passes over memory.

    Modules are shared: parameters, buffers and hooks of ``model`` stay where they are, and hold for both; hooks of
    convolutions whose parameters get no gradient are not called. What matches no block is called as it was. Results
    in float32 are the same bit for bit where PyTorch's BatchNorm multiplies and adds in one instruction; gradients
    differ in the order of sums.

    Args:
        model: A module-level graph.
        bits_of: The bits of a module that fake-quantizes by the range of each sample and channel, None of others.
        listener: Told of the statistics of BatchNorm layers that are fused, without quantization behind them. Forward
            pre-hooks of those layers are not called.
    """
    view = fx.GraphModule(model, copy.deepcopy(model.graph))
    for node in view.graph.nodes:
        conv = _module(view, node)
        if type(conv) is nn.Conv2d and _is_frozen(conv):
            view.add_submodule(f"frozen_{node.name}", _FrozenConv2d(conv))
            node.target = f"frozen_{node.name}"
    for node in list(view.graph.nodes):
        if type(_module(view, node)) not in _CAPS:
            continue
        found = _branches(view, node)
        if found is None:
            continue
        inputs, norms = found
        end, bits = node, None
        if len(node.users) == 1:
            (user,) = node.users
            module = _module(view, user)
            bits = None if module is None else bits_of(module)
            end = node if bits is None else user
        tail = [view.get_submodule(str(n.target)) for n in ([node] if end is node else [node, end])]
        readers = list(end.users)
        name = f"fused_{node.name}"
        view.add_submodule(name, _Block(norms, tail, bits or 0, 2 if len(readers) == 2 else 1, listener))
        with view.graph.inserting_after(end):
            call = view.graph.call_module(name, tuple(inputs))
        if len(readers) == 2:
            for index, reader in reversed(list(enumerate(readers))):
                with view.graph.inserting_after(call):
                    part = view.graph.call_function(operator.getitem, (call, index))
                reader.replace_input_with(end, part)
        else:
            end.replace_all_uses_with(call)
        view.graph.eliminate_dead_code()
    view.recompile()
    return view


def _module(graph_module: fx.GraphModule, node: Any) -> nn.Module | None:
    is_call = isinstance(node, fx.Node) and node.op == "call_module"
    return graph_module.get_submodule(str(node.target)) if is_call else None


def _is_frozen(conv: nn.Conv2d) -> bool:
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return plain and not any(parameter.requires_grad for parameter in conv.parameters())


def _branches(view: fx.GraphModule, relu: fx.Node) -> tuple[list[fx.Node], list[nn.BatchNorm2d]] | None:
    """Return what the block that ends in ``relu`` reads and the BatchNorm layers behind that, or None: no block."""
    (source,) = relu.all_input_nodes
    if len(source.users) != 1:
        return None
    summed = source.op == "call_function" and source.target is operator.add and len(source.all_input_nodes) == 2
    inputs: list[fx.Node] = []
    norms: list[nn.BatchNorm2d] = []
    # The branch with a BatchNorm comes first.
    branches = sorted(
        source.all_input_nodes if summed else [source], key=lambda n: not isinstance(_module(view, n), nn.BatchNorm2d)
    )
    for node in branches:
        norm = _module(view, node)
        if isinstance(norm, nn.BatchNorm2d) and len(node.users) == 1:
            inputs += node.all_input_nodes
            norms.append(norm)
        elif norms:
            inputs.append(node)
        else:
            return None
    return inputs, norms
