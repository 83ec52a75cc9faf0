"""Models that nobody should get far with, each sent as a pipeline."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.bad_inputs.bench import Answer, Bench
from services.common.models.cifar_resnet import resnet20
from tests.support import hostile_models
from tests.support.models import Residual, settle
from tests.support.onnx_graphs import quantized
from tests.support.pt2 import export, with_pickled_constant
from tests.support.unusable_models import CASES, NAMED

PLACE = "SubmitPipeline, VALIDATE"

Ask = Callable[[Bench], Answer]

_ARCHIVES = {
    ".pt2, constant that is a pickle with code": with_pickled_constant,
    ".pt2, weight that is a pickle with code": hostile_models.pickled_weight,
    ".pt2, operator os.system": hostile_models.foreign_operator,
    ".pt2, code as an argument's name": hostile_models.code_as_argument_name,
    ".pt2, compressed entries (a bomb's)": hostile_models.compressed,
    ".pt2, entry ../outside": hostile_models.entry_outside,
    ".pt2, path of a tensor through ..": hostile_models.tensor_outside,
    ".pt2, weight declared as 4 TiB": hostile_models.huge_shape,
}
_WEIGHTS = {
    "state dict with code": "state_dict_with_code",
    "safetensors, truncated": "truncated_safetensors",
    "weights of an unknown architecture": "unknown_architecture",
    ".pt2, truncated": "truncated_pt2",
    ".pt2 for another input shape than declared": "wrong_input_shape",
    ".pt2, BatchNorm folded away": "batch_norm_folded",
    ".pt2 without BatchNorm": "no_batch_norm",
}


def _altered(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    state = dict(resnet20(10, 1).state_dict())
    change(state)
    save_file(state, path)
    return path


def _filled(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state[name].fill_(value)


def _typed(state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    for name, tensor in state.items():
        state[name] = tensor.to(dtype)


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _flipped(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    return bytes(data)


def cases(folder: Path, marker: Path) -> Iterator[tuple[str, str, Ask]]:
    """Yield what each input is, where it is refused, and what sends it.

    Args:
        folder: Where to write files.
        marker: File that code in a model, if it ran, would create.
    """
    good = export(settle(Residual()), (3, 8, 8), folder / "good.pt2")
    bad = folder / "bad"

    def sent(path: Path, **source: object) -> Ask:
        return lambda bench: bench.model(path, **source)

    for name, make in _ARCHIVES.items():
        yield name, PLACE, sent(make(good, bad, marker))
    for name, case in _WEIGHTS.items():
        yield name, PLACE, sent(CASES[case].make(bad, marker), **CASES[case].source)
    for name, data in (
        (".pt2, one bit flipped", _flipped(good)),
        ("model of no bytes", b""),
        ("ONNX file as the model", quantized().SerializeToString()),
        ("random bytes as the model", torch.randint(256, (4096,), dtype=torch.uint8).numpy().tobytes()),
    ):
        yield name, PLACE, sent(_written(bad, data))
    header = b'{"a":{"dtype":"F32","shape":[1099511627776,1048576],"data_offsets":[0,4611686018427387904]}}'
    for name, data in (
        ("safetensors, tensor declared as 4 EiB", struct.pack("<Q", len(header)) + header),
        ("safetensors, header declared as 16 EiB", struct.pack("<Q", 2**64 - 1) + header),
    ):
        yield name, PLACE, sent(_written(bad, data), **NAMED)
    weight = next(iter(resnet20(10, 1).state_dict()))
    for name, change in (
        ("weights with NaN", _filled(weight, float("nan"))),
        ("weights with infinities", _filled(weight, float("inf"))),
        ("weights of type int64", lambda state: _typed(state, torch.int64)),
        ("weights of type complex64", lambda state: _typed(state, torch.complex64)),
        ("a weight is missing", lambda state: state.pop(weight)),
    ):
        yield name, PLACE, sent(_altered(bad, change), **NAMED)
