"""Files of models that intake must refuse, and what the user must be told about each."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from services.common.models.cifar_resnet import CifarResNet, resnet20
from tests.support.models import settle
from tests.support.pt2 import Payload, export, with_pickled_constant

SHAPE = (1, 8, 8)
NAMED = {"architecture": "resnet20", "input_shape": SHAPE}


@dataclasses.dataclass
class Case:
    """One model that must be refused.

    Attributes:
        make: Writes the file to the first path; code in it, if it ran, would create the second.
        reason: Reason of the failure.
        words: Part of its message.
        source: How the file is declared, as arguments of granq.model_source.
        field: Field of the request that the failure names.
    """

    make: Callable[[Path, Path], Path]
    reason: str
    words: str
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    field: str = "model.artifact"


def _tiny(path: Path) -> Path:
    return export(settle(CifarResNet(1, 10, 1)), SHAPE, path)


def _cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:-size])
    return path


def _weights(path: Path) -> Path:
    save_file(resnet20(10, 1).state_dict(), path)
    return path


def _code(path: Path, marker: Path) -> Path:
    torch.save({**resnet20(10, 1).state_dict(), "conv.weight": Payload(marker)}, path)
    return path


def _without_batch_norm(path: Path, *, folded: bool) -> Path:
    convolution = nn.Conv2d(1, 4, 3, bias=False).eval()
    first = fuse_conv_bn_eval(convolution, nn.BatchNorm2d(4).eval()) if folded else convolution
    return export(nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval(), SHAPE, path)


CASES = {
    "state_dict_with_code": Case(_code, "MODEL_UNSAFE_PICKLE", "safetensors", NAMED),
    "pt2_with_code": Case(
        lambda path, marker: with_pickled_constant(_tiny(path.with_suffix(".good")), path, marker),
        "MODEL_UNSAFE_PICKLE",
        "pickle",
    ),
    "batch_norm_folded": Case(
        lambda path, _: _without_batch_norm(path, folded=True), "BATCH_NORM_FOLDED", "before folding"
    ),
    "no_batch_norm": Case(lambda path, _: _without_batch_norm(path, folded=False), "BATCH_NORM_MISSING", "BatchNorm"),
    "unknown_architecture": Case(
        lambda path, _: _weights(path),
        "ARCHITECTURE_UNKNOWN",
        "resnet21",
        {**NAMED, "architecture": "resnet21"},
        "model.architecture",
    ),
    "wrong_input_shape": Case(
        lambda path, _: _tiny(path), "INPUT_SHAPE_MISMATCH", "9×9", {"input_shape": (1, 9, 9)}, "model.input_shape"
    ),
    "truncated_pt2": Case(lambda path, _: _cut(_tiny(path), 20_000), "MODEL_TRUNCATED", "cut off or damaged"),
    "truncated_safetensors": Case(
        lambda path, _: _cut(_weights(path), 20_000), "MODEL_TRUNCATED", "cut off or damaged", NAMED
    ),
}
