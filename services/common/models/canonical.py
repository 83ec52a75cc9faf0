"""Brings a traced or exported graph into the one form that the rest of the project works with.

The canonical graph has ``call_module`` nodes for Conv2d, Linear, BatchNorm2d, activations, pooling and Flatten, and
``call_function`` nodes for ``operator.add``, ``operator.mul``, ``torch.cat`` and whatever else there is. Each module is
called once. Sizes are numbers, the batch is −1 in reshapes, and nothing works in place. Each node carries its result's
shape and type in ``meta["tensor_meta"]``, at batch size 1.
"""

import copy
import operator
import re
from typing import Any, Final, cast

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp

from services.common.models import layer_rules, registry, shape_rules  # noqa: F401 - registers the rules
from services.common.models.archive import refuse
from services.common.models.emitter import BATCH_DEPENDENT, BatchDependent, Constant, Emitter

_IN_PLACE_OPERATORS: Final = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
# Batch sizes of the propagation; what differs between them depends on the batch.
_BATCHES: Final = (2, 3)


def canonicalize(raw: fx.GraphModule, input_shape: tuple[int, ...], batch: int | None = None) -> fx.GraphModule:
    """Return the canonical form of a graph.

    Args:
        raw: A graph with one placeholder, from symbolic tracing or from a .pt2. It is left as it is.
        input_shape: C×H×W of one image.
        batch: The batch size that the graph is fixed to; None when it takes any.

    Raises:
        InvalidArgumentError: INPUT_SHAPE_MISMATCH when images of that shape do not pass; MODEL_NOT_TRACEABLE.
    """
    runs = [_propagate(raw, input_shape, size) for size in ((batch,) if batch is not None else _BATCHES)]
    reserved = {str(n.target) for n in raw.graph.nodes if n.op == "call_module"}
    reserved |= {Constant(torch.empty(0), n.meta["fqn"]).owner for n in raw.graph.nodes if "fqn" in n.meta}
    result = _Rewriter(raw, runs, Emitter(reserved - {""})).rewrite()
    for size in (*_BATCHES, 1):
        output = _run_shapes(result, input_shape, size)
        if not isinstance(output, torch.Tensor) or output.dim() == 0 or output.shape[0] != size:
            raise refuse(
                "MODEL_NOT_TRACEABLE", "the model must return one tensor with a row for each image of the batch"
            )
    return result


def _run_shapes(module: fx.GraphModule, input_shape: tuple[int, ...], batch: int) -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), mode:
            return ShapeProp(module, fake_mode=mode).propagate(torch.empty(batch, *input_shape))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise refuse(
            "MODEL_NOT_TRACEABLE", "the model works with one batch size only; export it with a dynamic batch"
        ) from error


class _Recorder(fx.Interpreter):
    """Keeps the result of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.results: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep what it returns."""
        result = super().run_node(n)
        self.results[n] = result
        return result


def _propagate(raw: fx.GraphModule, input_shape: tuple[int, ...], batch: int) -> dict[fx.Node, Any]:
    """Return each node's result for a batch, with fake tensors: shapes without computation."""
    recorder = _Recorder(raw)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        try:
            recorder.run(torch.empty(batch, *input_shape))
        except Exception as error:
            shape = "×".join(map(str, input_shape))
            detail = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            raise refuse(
                "INPUT_SHAPE_MISMATCH",
                f"images of shape {shape} do not pass through the model: {detail}",
                "model.input_shape",
            ) from error
    return recorder.results


class _Rewriter:
    def __init__(self, raw: fx.GraphModule, runs: list[dict[fx.Node, Any]], emit: Emitter) -> None:
        self._raw = raw
        self._modules = dict(raw.named_modules())
        self._runs = runs
        self._emit = emit
        self._values: dict[fx.Node, Any] = {}

    def rewrite(self) -> fx.GraphModule:
        live = self._live()
        for node in self._raw.graph.nodes:
            if node.op == "output":
                return self._emit.finish(self._output(node.args[0]))
            if node in live or node.op == "placeholder":
                self._annotate(node)
                self._values[node] = value = self._rewrite(node)
                if isinstance(value, fx.Node) and "shape" not in value.meta and "shape" in node.meta:
                    value.meta["shape"] = node.meta["shape"]
                if _works_in_place(node, self._modules):
                    # Whoever reads the argument after this reads the result.
                    self._values[node.args[0]] = value
        raise refuse("MODEL_NOT_TRACEABLE", "the model returns nothing")

    def _live(self) -> set[fx.Node]:
        """Nodes that the output needs; the rest (checks, counters of training) is dropped."""
        live: set[fx.Node] = set()
        for node in reversed(self._raw.graph.nodes):
            users = set(node.users)
            if _works_in_place(node, self._modules):
                users |= set(node.args[0].users)
            # Going backwards, only what comes after the node is in the set yet.
            if node.op == "output" or not users.isdisjoint(live):
                live.add(node)
        return live

    def _output(self, value: Any) -> fx.Node:
        if isinstance(value, (tuple, list)) and len(value) == 1:
            value = value[0]
        result = self._values.get(value) if isinstance(value, fx.Node) else None
        if not isinstance(result, fx.Node):
            raise refuse("MODEL_NOT_TRACEABLE", "the model must return one tensor, the logits")
        return result

    def _annotate(self, node: fx.Node) -> None:
        results = [run[node] for run in self._runs]
        if not isinstance(results[0], torch.Tensor):
            return
        shapes = [tuple(result.shape) for result in results]
        if len(shapes) > 1:
            static = tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))
        else:
            batch = self._fixed_batch()
            static = tuple(-1 if axis == 0 and size == batch else size for axis, size in enumerate(shapes[0]))
        node.meta["shape"], node.meta["static_shape"], node.meta["dtype"] = shapes[0], static, results[0].dtype

    def _fixed_batch(self) -> int:
        placeholder = next(node for node in self._raw.graph.nodes if node.op == "placeholder")
        return int(self._runs[0][placeholder].shape[0])

    def _rewrite(self, node: fx.Node) -> Any:
        self._emit.hint, self._emit.owns_hint = _name_of(node), node.op == "call_module"
        if node.op == "placeholder":
            return self._emit.graph.placeholder("x")
        if node.op == "get_attr":
            return Constant(_attribute(self._raw, str(node.target)), node.meta.get("fqn", str(node.target)))
        results = [run[node] for run in self._runs]
        if isinstance(results[0], (int, float, bool, torch.Size, torch.dtype, torch.device, str)):
            return _static(results)
        try:
            return self._call(node)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            detail = f"the call {node.format_node()} is not understood"
            raise refuse("MODEL_NOT_TRACEABLE", f"the model cannot be brought into a known form: {detail}") from error

    def _call(self, node: fx.Node) -> Any:
        args, kwargs = self._resolve(node.args), self._resolve(node.kwargs)
        leaves = _leaves((args, kwargs))
        constants = [item for item in leaves if isinstance(item, Constant)]
        if constants and not any(isinstance(item, (fx.Node, BatchDependent)) for item in leaves):
            return self._fold(node, args, kwargs, constants[0].fqn)
        return self._apply(node, args, kwargs)

    def _apply(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            return self._module(node, args, kwargs)
        if node.op == "call_method":
            name = str(node.target)
            method = registry.METHODS.get(name)
            return method(self._emit, node, *args, **kwargs) if method else self._emit.method(name, *args, **kwargs)
        target: Any = node.target
        rule = registry.FUNCTIONS.get(target)
        if isinstance(target, torch._ops.OpOverload):
            rule = registry.FUNCTIONS.get(target._schema.name.removeprefix("aten::"))
        return rule(self._emit, node, *args, **kwargs) if rule else self._emit.call(target, *args, **kwargs)

    def _module(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        name = str(node.target)
        module = self._modules[name]
        self._emit.hint = name
        if type(module) in registry.MODULES:
            return registry.MODULES[type(module)](self._emit, node, module, *args, **kwargs)
        if type(module).__name__ == "StochasticDepth":
            return args[0]
        if kwargs or not all(isinstance(arg, fx.Node) for arg in args):
            raise refuse("MODEL_NOT_TRACEABLE", f"module {name!r} is called with more than tensors")
        module = copy.deepcopy(module)
        if hasattr(module, "inplace"):
            module.inplace = False
        return self._emit.module(module, *args, name=name)

    def _fold(self, node: fx.Node, args: Any, kwargs: Any, fqn: str) -> Any:
        """Compute what depends on parameters alone, such as a transposed weight."""
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda v: v.tensor if isinstance(v, Constant) else v)
        with torch.no_grad():
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            elif node.op == "call_module":
                value = self._modules[str(node.target)](*args, **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        return fx.node.map_aggregate(
            value, lambda v: cast("Any", Constant(v, fqn)) if isinstance(v, torch.Tensor) else v
        )

    def _resolve(self, value: Any) -> Any:
        return fx.node.map_aggregate(value, lambda v: self._values[v] if isinstance(v, fx.Node) else v)


def _works_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a call changes its first argument, which must be a node."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    target: Any = node.target
    name = (
        target._schema.name if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    )
    if target in _IN_PLACE_OPERATORS or node.kwargs.get("inplace") is True:
        return True
    return bool(name.endswith("_") and not name.endswith("__"))


def _static(results: list[Any]) -> Any:
    """Return a value that is the same at every batch size, or the mark for one that is not."""
    if isinstance(results[0], torch.Size):
        return tuple(_static([size[axis] for size in results]) for axis in range(len(results[0])))
    return results[0] if all(result == results[0] for result in results) else BATCH_DEPENDENT


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []

    def visit(item: Any) -> Any:
        found.append(item)
        return item

    fx.node.map_aggregate(value, visit)
    return found


def _attribute(module: nn.Module, name: str) -> torch.Tensor:
    owner, _, attribute = name.rpartition(".")
    tensor: torch.Tensor = getattr(module.get_submodule(owner), attribute)
    return tensor


def _name_of(node: fx.Node) -> str:
    """Return a module name for an operation, such as "relu"; the emitter numbers them."""
    target = node.target
    name = target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else node.name
    return re.sub("_+", "_", name).strip("_") or "call"
