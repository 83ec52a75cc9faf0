"""Reads named weights: safetensors, and ``torch.save`` files without the code that a pickle can hold."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from granq.v1 import common_pb2
from services.common.models.archive import DTYPES, open_zip, refuse


def read_state_dict(path: Path, model_format: "common_pb2.ModelFormat") -> dict[str, torch.Tensor]:
    """Read named tensors from safetensors or from a ``torch.save`` file, never running its code.

    A training checkpoint's ``state_dict`` or ``model`` entry is taken, and DataParallel's ``module.`` prefix removed.

    Raises:
        InvalidArgumentError: MODEL_UNSAFE_PICKLE when the file needs code to load; MODEL_TRUNCATED; WEIGHTS_INVALID.
    """
    if model_format == common_pb2.MODEL_FORMAT_SAFETENSORS:
        state: Any = _read_safetensors(path)
    else:
        state = _read_pickle(path)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state:
        raise refuse("WEIGHTS_INVALID", "the file holds no state dict (a mapping from names to tensors)")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise refuse("WEIGHTS_INVALID", f"entry {name!r} of the state dict is not a dense tensor")
        if value.dtype not in DTYPES.values():
            raise refuse(
                "WEIGHTS_INVALID", f"entry {name!r} has elements of type {value.dtype}; save the weights as float32"
            )
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise refuse("MODEL_TRUNCATED", f"the safetensors file is cut off or damaged: {error}") from error


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped:
        open_zip(path).close()
    try:
        return torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error):
            raise refuse(
                "MODEL_UNSAFE_PICKLE",
                "the file is a pickle that holds more than tensors; loading it could run code, so it is refused. "
                "Convert it where you trust it: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')",
            ) from error
        raise refuse("MODEL_TRUNCATED", "the state dict is cut off or damaged") from error
    except Exception as error:  # A damaged pickle makes torch raise anything: struct.error, AssertionError and others.
        raise refuse("MODEL_TRUNCATED", "the state dict is cut off or damaged") from error


def check_numbers(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse weights that are not finite, and variances below zero.

    Raises:
        InvalidArgumentError: MODEL_NAN or BATCH_NORM_INVALID.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise refuse("MODEL_NAN", f"tensor {name!r} holds values that are not finite")
        if name.endswith("running_var") and tensor.numel() and float(tensor.min()) < 0:
            raise refuse("BATCH_NORM_INVALID", f"tensor {name!r} holds a negative variance")
