"""Turns the graph of a ``.pt2`` archive into a torch.fx graph of ATen calls.

The graph's JSON names operators, arguments and tensors. Operators are looked up in ``torch.ops.aten`` only (and a few
integer functions of ``operator`` for symbolic sizes), so a graph cannot call anything but ATen. Symbolic expressions,
guards and metadata are not read: :mod:`services.common.models.canonical` finds the sizes again by propagation.
"""

import keyword
import operator
import re
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx, nn

from services.common.models.archive import DTYPES, Pt2Archive, refuse

_OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    f"_operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "ge", "le", "gt", "lt", "getitem")
}
# A module cannot be named like an attribute of the module that holds it.
_RESERVED: Final = frozenset(dir(fx.GraphModule)) | frozenset(vars(nn.Module()))
# Checks that torch.export leaves in the graph; they compute nothing.
_ASSERTIONS: Final = ("sym_constrain_range", "_assert_scalar", "_assert_tensor_metadata", "_assert_async", "_guards_fn")
# ATen calls without a place in inference of a CNN: they read files or need a generator's state.
_REFUSED: Final = ("from_file", "rand", "normal", "bernoulli", "multinomial", "poisson", "set_", "resize")


def read_program(archive: Pt2Archive) -> tuple[fx.GraphModule, tuple[int, ...], int | None]:
    """Return the program as ATen calls, the shape C×H×W of its input, and its batch size where it is fixed.

    Parameters, buffers and constants become ``get_attr`` nodes that carry their qualified name in ``meta["fqn"]``.

    Raises:
        InvalidArgumentError: MODEL_NOT_TRACEABLE, MODEL_ARCHIVE_INVALID or INPUT_SHAPE_MISMATCH.
    """
    try:
        return _Reader(archive).read()
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
        raise refuse("MODEL_ARCHIVE_INVALID", "the graph in the .pt2 does not follow torch.export's schema") from error


class _Reader:
    def __init__(self, archive: Pt2Archive) -> None:
        self._tensors = archive.tensors
        module = archive.program["graph_module"]
        self._signature = module["signature"]
        self._source = module["graph"]
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._values: dict[str, fx.Node] = {}

    def read(self) -> tuple[fx.GraphModule, tuple[int, ...], int | None]:
        shape, batch = self._read_inputs()
        for node in self._source["nodes"]:
            self._read_node(node)
        self._graph.output(self._read_output())
        return fx.GraphModule(self._root, self._graph), shape, batch

    def _read_inputs(self) -> tuple[tuple[int, ...], int | None]:
        inputs: list[str] = []
        for number, spec in enumerate(self._signature["input_specs"]):
            ((kind, value),) = spec.items()
            if kind == "user_input":
                inputs.append(value["arg"]["as_tensor"]["name"])
            elif kind in ("parameter", "buffer", "tensor_constant"):
                self._read_tensor(number, value["arg"]["name"], value[f"{kind}_name"])
            else:
                raise refuse(
                    "MODEL_NOT_TRACEABLE", f"the program takes an input of kind {kind!r}; only tensors are read"
                )
        if len(inputs) != 1:
            raise refuse(
                "MODEL_NOT_TRACEABLE", f"the program must take one batch of images; it takes {len(inputs)} inputs"
            )
        meta = self._source["tensor_values"][inputs[0]]
        sizes = meta["sizes"]
        if (
            len(sizes) != 4
            or not all("as_int" in size for size in sizes[1:])
            or DTYPES.get(meta["dtype"]) != torch.float32
        ):
            raise refuse(
                "INPUT_SHAPE_MISMATCH",
                "the program must take a float32 batch N×C×H×W with fixed C, H and W; let only the batch be dynamic",
            )
        self._values[inputs[0]] = self._graph.placeholder("x")
        return tuple(int(size["as_int"]) for size in sizes[1:]), sizes[0].get("as_int")

    def _read_tensor(self, number: int, name: str, fqn: str) -> None:
        if fqn not in self._tensors:
            raise refuse("MODEL_TRUNCATED", f"the .pt2 lacks the data of {fqn!r}")
        _check_name(fqn)
        attribute = f"tensor_{number}"
        self._root.register_buffer(attribute, self._tensors[fqn])
        node = self._graph.get_attr(attribute)
        node.meta["fqn"] = fqn
        self._values[name] = node

    def _read_output(self) -> fx.Node:
        outputs = [spec["user_output"]["arg"] for spec in self._signature["output_specs"] if "user_output" in spec]
        if len(outputs) != 1 or "as_tensor" not in outputs[0]:
            raise refuse("MODEL_NOT_TRACEABLE", "the program must return one tensor, the logits")
        return self._values[outputs[0]["as_tensor"]["name"]]

    def _read_node(self, source: dict[str, Any]) -> None:
        name: str = source["target"]
        if any(name.rpartition("aten.")[2].startswith(word) for word in _ASSERTIONS):
            return
        target = _OPERATORS.get(name) or _aten(name)
        args, kwargs = self._arguments(source["inputs"], target)
        self._bind(source["outputs"], self._graph.call_function(target, tuple(args), kwargs))

    def _arguments(self, inputs: list[dict[str, Any]], target: Any) -> tuple[list[Any], dict[str, Any]]:
        """Return positional and keyword arguments; the JSON leaves out those that have their default."""
        schema = target._schema.arguments if isinstance(target, torch._ops.OpOverload) else []
        positions = {argument.name: index for index, argument in enumerate(schema) if not argument.kwarg_only}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for item in inputs:
            value, name = self._argument(item["arg"]), item["name"]
            if not schema or positions.get(name) == len(args):
                args.append(value)
            elif any(name == argument.name for argument in schema):
                kwargs[name] = value
            else:
                # Not just an error later: fx writes names of arguments into Python source as they are.
                raise refuse("MODEL_ARCHIVE_INVALID", f"{target} has no argument {name!r}")
        return args, kwargs

    def _bind(self, outputs: list[dict[str, Any]], node: fx.Node) -> None:
        """Give a node's results their names; several results become getitem nodes."""
        names: list[str] = []
        for output in outputs:
            ((kind, value),) = output.items()
            if kind == "as_tensor":
                names.append(value["name"])
            elif kind == "as_tensors":
                names.extend(item["name"] for item in value)
            elif kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
                names.append(value["as_name"])
            elif kind == "as_none":
                names.append("")
            else:
                raise refuse("MODEL_NOT_TRACEABLE", f"a result of kind {kind!r} is not supported")
        if len(names) == 1 and "as_tensors" not in outputs[0]:
            self._values[names[0]] = node
            return
        for index, name in enumerate(names):
            if name:
                self._values[name] = self._graph.call_function(operator.getitem, (node, index))

    def _argument(self, argument: dict[str, Any]) -> Any:
        ((kind, value),) = argument.items()
        match kind:
            case "as_none":
                return None
            case "as_tensor":
                return self._values[value["name"]]
            case "as_tensors":
                return [self._values[item["name"]] for item in value]
            case "as_int" | "as_float" | "as_bool" | "as_string":
                return value
            case "as_ints" | "as_floats" | "as_bools" | "as_strings":
                return list(value)
            case "as_sym_int" | "as_sym_float" | "as_sym_bool":
                return self._symbol(value)
            case "as_sym_ints" | "as_sym_floats" | "as_sym_bools":
                return [self._symbol(item) for item in value]
            case "as_optional_tensor":
                return self._argument(value)
            case "as_optional_tensors":
                return [self._argument(item) for item in value]
            case "as_scalar_type":
                return DTYPES[value]
            case "as_memory_format":
                return {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}[value]
            case "as_layout":
                return {7: torch.strided}[value]
            case "as_device":
                # Wherever it was exported, it is read on the CPU and moved as a whole later.
                return torch.device("cpu")
            case _:
                raise refuse("MODEL_NOT_TRACEABLE", f"an argument of kind {kind!r} is not supported")

    def _symbol(self, value: dict[str, Any]) -> Any:
        ((kind, content),) = value.items()
        return self._values[content] if kind == "as_name" else content


def _check_name(fqn: str) -> None:
    """Refuse names that a parameter cannot have.

    Modules of the graph are named after their parameters, and fx writes these names into Python source as they are, so
    a name with a quote in it would be code. A hyphen, which torchvision's RegNets have, only makes fx quote the name.
    """
    for part in fqn.split("."):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", part) or keyword.iskeyword(part) or part in _RESERVED:
            raise refuse("MODEL_ARCHIVE_INVALID", f"the .pt2 names a parameter {fqn!r}, which PyTorch does not allow")


def _aten(name: str) -> Any:
    """Return the ATen overload of a name such as "torch.ops.aten.conv2d.default"."""
    parts = name.split(".")
    if parts[:3] != ["torch", "ops", "aten"] or len(parts) != 5:
        raise refuse("MODEL_NOT_TRACEABLE", f"the program calls {name!r}; only ATen operators are read")
    if any(parts[3].startswith(word) for word in _REFUSED):
        raise refuse("MODEL_NOT_TRACEABLE", f"the program calls {name!r}, which inference of a CNN does not need")
    packet = getattr(torch.ops.aten, parts[3], None)
    overload = getattr(packet, parts[4], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(overload, torch._ops.OpOverload):
        raise refuse("MODEL_NOT_TRACEABLE", f"the program calls {name!r}, which this version of torch does not have")
    return overload
