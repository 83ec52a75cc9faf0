"""Changes a good .pt2 archive as an attacker would; each function returns the file that it wrote."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.pt2 import Payload, edit_json, rewrite, with_pickled_constant

WEIGHTS = "data/weights/model_weights_config.json"
GRAPH = "models/model.json"

Make = Callable[[Path, Path, Path], Path]
"""Takes the good archive, the file to write, and a file that code in it, if it ran, would create."""


def pickled_weight(archive: Path, target: Path, marker: Path) -> Path:
    """Have a weight be unpickled."""
    torch.save(Payload(marker), target)
    payload = target.read_bytes()

    def edit(value: Any) -> None:
        next(iter(value["config"].values())).update(use_pickle=True, path_name="weight_evil")

    return rewrite(archive, target, {WEIGHTS: edit_json(edit)}, {"data/weights/weight_evil": payload})


def evaluated_size(archive: Path, target: Path, marker: Path) -> Path:
    """Have a size be an expression that torch's own loader evaluates."""
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def edit(value: Any) -> None:
        for symbol in value["graph_module"]["graph"]["sym_int_values"].values():
            symbol["as_expr"]["expr_str"] = code
        for meta in value["graph_module"]["graph"]["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = code

    return rewrite(archive, target, {GRAPH: edit_json(edit)})


def pickled_inputs(archive: Path, target: Path, marker: Path) -> Path:
    """Have the sample inputs be something else."""
    torch.save(Payload(marker), target)
    payload = target.read_bytes()
    return rewrite(archive, target, {"data/sample_inputs/model.pt": lambda _: payload})


def foreign_operator(archive: Path, target: Path, _marker: Path) -> Path:
    """Have the graph call a function of Python's."""

    def edit(value: Any) -> None:
        value["graph_module"]["graph"]["nodes"][-1]["target"] = "os.system"

    return rewrite(archive, target, {GRAPH: edit_json(edit)})


def code_as_argument_name(archive: Path, target: Path, marker: Path) -> Path:
    """Name an argument in Python: fx writes names into source, which it compiles and runs."""

    def edit(value: Any) -> None:
        node = value["graph_module"]["graph"]["nodes"][-1]
        node["inputs"][-1]["name"] = f"bias=__import__('pathlib').Path({str(marker)!r}).touch(), x"

    return rewrite(archive, target, {GRAPH: edit_json(edit)})


def renamed_parameter(archive: Path, target: Path, name: str) -> Path:
    """Rename a parameter of the stem: fx writes these names too, and a quote would end the string around them."""

    def rename(text: bytes) -> bytes:
        return text.replace(b'"stem.0.weight"', json.dumps(f"{name}.weight").encode())

    return rewrite(archive, target, {GRAPH: rename, WEIGHTS: rename})


def compressed(archive: Path, target: Path, _marker: Path) -> Path:
    """Compress the entries, which torch does not, and which a bomb would need."""
    return rewrite(archive, target, compression=zipfile.ZIP_DEFLATED)


def entry_outside(archive: Path, target: Path, _marker: Path) -> Path:
    """Add an entry that a careless unpacker would write beside its folder."""
    return rewrite(archive, target, additions={"../outside": b"x"})


def tensor_outside(archive: Path, target: Path, _marker: Path) -> Path:
    """Have a tensor's path lead through the folder above."""

    def edit(value: Any) -> None:
        next(iter(value["config"].values()))["path_name"] = "../weights/weight_0"

    return rewrite(archive, target, {WEIGHTS: edit_json(edit)})


def huge_shape(archive: Path, target: Path, _marker: Path) -> Path:
    """Declare a weight of four terabytes; strides of 0 would make it of one number."""

    def edit(value: Any) -> None:
        meta = next(iter(value["config"].values()))["tensor_meta"]
        meta["sizes"] = [{"as_int": 1 << 20}, {"as_int": 1 << 20}]
        meta["strides"] = [{"as_int": 0}, {"as_int": 0}]

    return rewrite(archive, target, {WEIGHTS: edit_json(edit)})


WITH_CODE: tuple[Make, ...] = (with_pickled_constant, pickled_weight, evaluated_size, pickled_inputs)
"""torch's own loader runs what they carry; the last two are in parts that need not be read."""
