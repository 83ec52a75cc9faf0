"""Makes .pt2 archives, and changes them as an attacker or a broken disk would."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def export(model: nn.Module, input_shape: tuple[int, ...], path: Path, *, dynamic: bool = True) -> Path:
    """Export a model with a dynamic batch, or with a fixed batch of 2 and its operators decomposed."""
    example = (torch.zeros(2, *input_shape),)
    if dynamic:
        program = torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    else:
        program = torch.export.export(model, example).run_decompositions()
    torch.export.save(program, path)
    return path


def rewrite(
    source: Path,
    target: Path,
    changes: dict[str, Callable[[bytes], bytes]] | None = None,
    additions: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Copy an archive; changes and additions are named without the top folder."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            change = (changes or {}).get(name.removeprefix(f"{root}/"), bytes)
            new.writestr(name, change(old.read(name)))
        for name, data in (additions or {}).items():
            new.writestr(name if name.startswith("../") else f"{root}/{name}", data)
    return target


def edit_json(edit: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    """Return a change that edits parsed JSON in place."""

    def change(data: bytes) -> bytes:
        value = json.loads(data)
        edit(value)
        return json.dumps(value).encode()

    return change


class Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return _touch, (str(self._marker),)


def _touch(path: str) -> None:
    Path(path).touch()


def with_pickled_constant(archive: Path, target: Path, marker: Path) -> Path:
    """Copy an archive and add a constant that creates ``marker`` when it is unpickled, as torch's own loader does."""

    def edit(value: Any) -> None:
        value["config"]["evil"] = {
            "path_name": "opaque_obj_0",
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }

    changes = {"data/constants/model_constants_config.json": edit_json(edit)}
    return rewrite(archive, target, changes, {"data/constants/opaque_obj_0": pickle.dumps(Payload(marker))})
