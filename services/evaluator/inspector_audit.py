"""Reads out of what TensorRT's engine inspector says which layers run in INT8.

The inspector lists the engine's kernels as JSON, each with the ONNX nodes that it computes. Keys and values are not
specified by NVIDIA. What is relied on here is what published listings of TensorRT 8.6 to 10 have in common:

* "Metadata" holds "[ONNX Layer: name]" for each node; where it is empty, "Name" joins the nodes' names with " + ".
* Convolutions have "Weights" with a "Type", such as "Int8", "Half" or "Float".
* "Inputs" have a "Format/Datatype" that ends in the number format, or "N/A due to dynamic shapes" where no execution
  context with fixed shapes was given.
* "TacticName" of an INT8 kernel holds the formats of its operands, such as "i8i8_i8i32_f32".

Whatever else a listing says, a layer of which it shows no format counts neither as INT8 nor as float.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from services.evaluator.graph import Layer
from services.evaluator.plan_audit import FloatLayer, PlanAudit, why_float

_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_JOINTS = re.compile(r" \+ | \|\| ")
# They move values or hold them, and are named after the layers beside them.
_MOVERS = frozenset({"Constant", "NoOp", "Reformat"})
_INT8_TACTIC = re.compile(r"i8i8|i8f\d+_i8i32|int8|imma", re.IGNORECASE)
_FLOAT_FORMATS = re.compile(r"float|half|fp\d|bf16|tf32", re.IGNORECASE)

Kernel = dict[str, Any]


def audit_inspector(information: str, layers: Sequence[Layer]) -> PlanAudit | None:
    """Find out which layers run in INT8.

    Args:
        information: What the inspector says of an engine, as JSON.
        layers: Layers of the graph that it was built from.

    Returns:
        The audit, or None where the listing shows the format of no layer.
    """
    kernels = list(_kernels(information))
    verdicts = {layer.name: _verdict([k for k in kernels if _computes(k, layer.name)]) for layer in layers}
    floats = tuple(
        FloatLayer(layer, why_float(layer) or f"the builder chose {verdicts[layer.name][1]}")
        for layer in layers
        if verdicts[layer.name][0] is False
    )
    int8 = sum(verdict is True for verdict, _ in verdicts.values())
    return PlanAudit(int8, len(layers), floats) if int8 or floats else None


def _kernels(information: str) -> Iterator[Kernel]:
    try:
        # Not strict, because the separators in metadata are control characters, which not every version escapes.
        listing = json.loads(information, strict=False)
    except ValueError:
        return
    entries = listing.get("Layers") if isinstance(listing, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and str(entry.get("LayerType")) not in _MOVERS:
            yield entry


def _computes(kernel: Kernel, name: str) -> bool:
    nodes = _NODE.findall(str(kernel.get("Metadata", ""))) or _JOINTS.split(str(kernel.get("Name", "")))
    # As the parser names a node that has no name after its output.
    return name in nodes or f"node_of_{name}" in nodes


def _verdict(kernels: list[Kernel]) -> tuple[bool | None, str]:
    """Return whether a layer's kernels run in INT8, None where they do not show, and what they are.

    A convolution's weights tell best. Without them, its tactic does, and last its input: a kernel beside it that works
    on its float sums may be listed under its name as well.
    """
    for evidence in (_weights, _tactic, _input):
        found = {verdict: kernel for kernel in kernels if (verdict := evidence(kernel)) is not None}
        preferred = (False, True) if evidence is _weights else (True, False)
        for verdict in preferred:
            if verdict in found:
                return verdict, _described(found[verdict])
    return None, ""


def _weights(kernel: Kernel) -> bool | None:
    weights = kernel.get("Weights")
    return _is_int8(weights.get("Type")) if isinstance(weights, dict) else None


def _tactic(kernel: Kernel) -> bool | None:
    return True if _INT8_TACTIC.search(str(kernel.get("TacticName", ""))) else None


def _input(kernel: Kernel) -> bool | None:
    inputs = kernel.get("Inputs")
    first = inputs[0] if isinstance(inputs, list) and inputs else None
    return _is_int8(first.get("Format/Datatype")) if isinstance(first, dict) else None


def _is_int8(text: object) -> bool | None:
    """Return whether a number format is INT8; None where it is neither that nor a float."""
    if "int8" in str(text).lower():
        return True
    return False if _FLOAT_FORMATS.search(str(text)) else None


def _described(kernel: Kernel) -> str:
    weights = kernel.get("Weights")
    of = weights.get("Type") if isinstance(weights, dict) else ""
    kind = str(kernel.get("LayerType") or "a kernel")
    return " ".join(filter(None, (kind, f"with {of} weights" if of else "", str(kernel.get("TacticName") or ""))))
