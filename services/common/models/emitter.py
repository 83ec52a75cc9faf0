"""Builds the canonical graph: one node form per operation, modules for layers, activations and pooling."""

import copy
import operator
import re
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from services.common.models.archive import refuse


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the image: a parameter, a buffer, or what was computed from them.

    Attributes:
        tensor: Its value.
        fqn: Qualified name of the parameter it came from; empty for others.
    """

    tensor: torch.Tensor
    fqn: str = ""

    @property
    def owner(self) -> str:
        """Qualified name of the module that owned the parameter."""
        return self.fqn.rpartition(".")[0]


class BatchDependent:
    """A number that changes with the batch size; only reshapes may use it, which read their result's shape instead."""


BATCH_DEPENDENT: Final = BatchDependent()


class Emitter:
    """Collects nodes and modules of the new graph.

    Attributes:
        graph: The graph so far.
        hint: Name of the operation at hand, for what is appended.
        owns_hint: Whether that is the name of a module of the source, so that it may be taken as it is.
    """

    def __init__(self, reserved: set[str]) -> None:
        """Begin an empty graph.

        Args:
            reserved: Module names that belong to layers; generated names keep clear of them.
        """
        self.graph = fx.Graph()
        self._root: dict[str, Any] = {}
        self._taken: set[str] = set()
        self._reserved = reserved
        self._constants: dict[int, fx.Node] = {}
        self.hint = ""
        self.owns_hint = False

    def module(self, module: nn.Module, *inputs: fx.Node, name: str = "") -> fx.Node:
        """Append a call of a module, under a free name close to ``name`` (default: the current hint)."""
        target = self._free(name or self.hint, owns=bool(name) or self.owns_hint)
        self._root[target] = module
        return self.graph.call_module(target, inputs)

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call of a function; constants become get_attr nodes.

        Raises:
            InvalidArgumentError: MODEL_NOT_TRACEABLE when an argument changes with the batch size.
        """
        return self.graph.call_function(function, self._materialize(args), self._materialize(kwargs))

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call of a tensor's method."""
        return self.graph.call_method(name, self._materialize(args), self._materialize(kwargs))

    def finish(self, output: fx.Node) -> fx.GraphModule:
        """Return the module of the graph that ends in ``output``, in eval mode, without nodes that lead nowhere."""
        self.graph.output(output)
        module = fx.GraphModule(self._root, self.graph)
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.graph.lint()
        module.recompile()
        return module.eval()

    def source_module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node of the new graph calls, or None."""
        return self._root.get(str(node.target)) if node.op == "call_module" else None

    def _materialize(self, value: Any) -> Any:
        if isinstance(value, Constant):
            return self._constant(value)
        if isinstance(value, BatchDependent):
            raise refuse("MODEL_NOT_TRACEABLE", f"the model computes with the batch size at {self.hint!r}")
        if isinstance(value, slice):
            return slice(*(self._materialize(part) for part in (value.start, value.stop, value.step)))
        if isinstance(value, (list, tuple)):
            items = [self._materialize(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self._materialize(item) for key, item in value.items()}
        return value

    def _constant(self, constant: Constant) -> fx.Node:
        key = id(constant.tensor)
        if key not in self._constants:
            name = self._free("constant_" + re.sub(r"\W", "_", constant.fqn or self.hint))
            self._root[name] = constant.tensor.detach()
            self._constants[key] = self.graph.get_attr(name)
        return self._constants[key]

    def _free(self, name: str, owns: bool = False) -> str:
        base, number = name, 0
        while not self._is_free(name, owns and number == 0):
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name

    def _is_free(self, name: str, owns: bool) -> bool:
        if name in self._taken or (not owns and name in self._reserved):
            return False
        others = self._taken if owns else self._taken | self._reserved
        return not any(other.startswith(name + ".") or name.startswith(other + ".") for other in others)


def conv2d(
    emit: Emitter,
    x: fx.Node,
    weight: Constant,
    bias: Constant | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> fx.Node:
    """Append an nn.Conv2d with the given weights."""
    out_channels, per_group, *kernel = weight.tensor.shape
    module = nn.Conv2d(
        per_group * groups,
        out_channels,
        pair(kernel),
        pair(stride),
        padding if isinstance(padding, str) else pair(padding),
        pair(dilation),
        groups,
        bias=bias is not None,
        device="meta",
    )
    module.weight = nn.Parameter(weight.tensor.detach().clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.tensor.detach().clone())
    return padded_conv2d(emit, x, module, weight.owner)


def padded_conv2d(emit: Emitter, x: fx.Node, module: nn.Conv2d, name: str) -> fx.Node:
    """Append an nn.Conv2d whose padding is numbers and zeros; other paddings become a pad before it.

    A pad with zeros that is there already, as for the "same" padding of other frameworks, joins the convolution's own.
    """
    module = copy.deepcopy(module)
    around: list[int] = list(module._reversed_padding_repeated_twice)
    if module.padding_mode == "zeros" and pads_with_zeros(x):
        outer: Any = x.args[1]
        x, around = cast("fx.Node", x.args[0]), [a + b for a, b in zip([*outer, 0, 0], around, strict=False)]
    symmetric = around[0] == around[1] and around[2] == around[3]
    if module.padding_mode != "zeros" or not symmetric:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = emit.call(F.pad, x, around, mode, *([0.0] if mode == "constant" else []))
        module.padding, module.padding_mode = (0, 0), "zeros"
    else:
        module.padding = (around[2], around[0])
    return emit.module(module, x, name=name)


def pads_with_zeros(node: fx.Node) -> bool:
    """Whether a node of the new graph pads width, or height too, with zeros, and crops nothing."""
    if node.target is not F.pad or tuple(node.args[2:]) != ("constant", 0.0):
        return False
    around: Any = node.args[1]
    return len(around) in (2, 4) and min(around) >= 0


def linear(emit: Emitter, x: fx.Node, weight: Constant, bias: Constant | None) -> fx.Node:
    """Append an nn.Linear with the given weights (out×in)."""
    module = nn.Linear(weight.tensor.shape[1], weight.tensor.shape[0], bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight.tensor.detach().clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.tensor.detach().clone())
    return emit.module(module, x, name=weight.owner)


def batch_norm(
    emit: Emitter,
    x: fx.Node,
    weight: Constant | None,
    bias: Constant | None,
    mean: Constant | None,
    var: Constant | None,
    eps: float,
    rank: int,
) -> fx.Node:
    """Append an nn.BatchNorm2d (1d for inputs N×C) with running statistics; a missing affine becomes 1 and 0.

    Raises:
        InvalidArgumentError: BATCH_NORM_MISSING when the layer has no running statistics.
    """
    if mean is None or var is None:
        raise refuse(
            "BATCH_NORM_MISSING", f"the BatchNorm at {emit.hint!r} keeps no running statistics, which are needed"
        )
    channels = mean.tensor.numel()
    module = (nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d)(channels, eps=eps)
    with torch.no_grad():
        module.running_mean = mean.tensor.detach().clone().float()
        module.running_var = var.tensor.detach().clone().float()
        if weight is not None:
            module.weight.copy_(weight.tensor)
        if bias is not None:
            module.bias.copy_(bias.tensor)
    return emit.module(module, x, name=mean.owner)


def binary(emit: Emitter, function: Any, a: Any, b: Any) -> Any:
    """Append a + b, a * b and the like.

    Activations that torch.export's decompositions take apart are put together again: SiLU in x · sigmoid(x), Hardswish
    in x · relu6(x + 3) / 6 and Hardsigmoid in relu6(x + 3) / 6.
    """
    if function is operator.mul:
        for x, gate in ((a, b), (b, a)):
            if isinstance(gate, fx.Node) and isinstance(emit.source_module(gate), nn.Sigmoid) and gate.args == (x,):
                return emit.module(nn.SiLU(), x)
    if function is operator.truediv and isinstance(a, fx.Node) and b == 6:
        shifted = _shifted(emit, a)
        if shifted is not None:
            return emit.module(nn.Hardsigmoid(), shifted)
        if a.target is operator.mul:
            for x, gate in (a.args, a.args[::-1]):
                if isinstance(gate, fx.Node) and isinstance(x, fx.Node) and _shifted(emit, gate) is x:
                    return emit.module(nn.Hardswish(), x)
    return emit.call(function, a, b)


def _shifted(emit: Emitter, node: fx.Node) -> fx.Node | None:
    """Return x when the node is relu6(x + 3), else None."""
    if not isinstance(emit.source_module(node), nn.ReLU6):
        return None
    total = node.args[0]
    if isinstance(total, fx.Node) and total.target is operator.add and total.args[1] == 3:
        return total.args[0] if isinstance(total.args[0], fx.Node) else None
    return None


def pair(value: Any) -> tuple[int, int]:
    """Return height and width of a size given as one number, one value or two."""
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])
