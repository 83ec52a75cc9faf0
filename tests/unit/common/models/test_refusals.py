"""Models that cannot be used are refused with a stable reason and a message that says what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from granq.v1 import common_pb2
from services.common.errors import InvalidArgumentError
from services.common.models.cifar_resnet import CifarResNet, resnet20
from tests.support.pt2 import export, rewrite

Refusal = Callable[..., InvalidArgumentError]
NAMED = {"architecture": "resnet20", "input_shape": (3, 16, 16)}


def _weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None] = lambda _: None) -> Path:
    state = resnet20().state_dict()
    change(state)
    save_file(state, path)
    return path


def test_file_damage(archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    cases = {"empty": b"", "half": archive.read_bytes()[: archive.stat().st_size // 2], "text": b"hello, world"}
    reasons = {}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        reasons[name] = refusal(tmp_path / name).reason
    assert reasons == {"empty": "MODEL_TRUNCATED", "half": "MODEL_TRUNCATED", "text": "MODEL_FORMAT_UNKNOWN"}


def test_flipped_bits(archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    data = bytearray(archive.read_bytes())
    data[300] ^= 0xFF
    (tmp_path / "flipped.pt2").write_bytes(data)
    assert refusal(tmp_path / "flipped.pt2").reason == "MODEL_TRUNCATED"


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_truncated_weights(suffix: str, tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / f"w.{suffix}"
    save_file(resnet20().state_dict(), path) if suffix == "safetensors" else torch.save(resnet20().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-5000])
    assert refusal(path, **NAMED).reason == "MODEL_TRUNCATED"


def test_other_versions(archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    path = rewrite(archive, tmp_path / "v9.pt2", {"archive_version": lambda _: b"9"})
    assert refusal(path).reason == "MODEL_VERSION_UNSUPPORTED"


def test_unknown_architecture(tmp_path: Path, refusal: Refusal) -> None:
    path = _weights(tmp_path / "w.safetensors")
    error = refusal(path, architecture="resnet21", input_shape=(3, 16, 16))
    assert (error.reason, error.field) == ("ARCHITECTURE_UNKNOWN", "model.architecture")
    error = refusal(path, architecture="googlenet", input_shape=(3, 64, 64))
    assert error.reason == "ARCHITECTURE_AMBIGUOUS"
    assert refusal(path, input_shape=(3, 16, 16)).reason == "ARCHITECTURE_REQUIRED"
    # A detection model has no logits.
    error = refusal(path, architecture="fasterrcnn_resnet50_fpn", input_shape=(3, 64, 64))
    assert error.reason == "ARCHITECTURE_UNKNOWN"


def test_wrong_format_declared(archive: Path, refusal: Refusal) -> None:
    error = refusal(archive, format=common_pb2.MODEL_FORMAT_SAFETENSORS)
    assert (error.reason, error.field) == ("MODEL_FORMAT_MISMATCH", "model.format")
    assert refusal(archive, architecture="resnet20").reason == "ARCHITECTURE_NOT_ALLOWED"


def test_weights_that_do_not_fit_are_named(tmp_path: Path, refusal: Refusal) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        del state["conv.weight"]
        state["extra.weight"] = torch.zeros(2)
        state["fc.bias"] = torch.zeros(3)

    error = refusal(_weights(tmp_path / "w.safetensors", change), **NAMED)
    assert error.reason == "WEIGHTS_MISMATCH"
    assert all(part in error.message for part in ("conv.weight", "extra.weight", "fc.bias", "(3,)"))


def test_numbers_that_are_none(tmp_path: Path, refusal: Refusal) -> None:
    def nan(state: dict[str, torch.Tensor]) -> None:
        state["conv.weight"][0, 0, 0, 0] = torch.nan

    def negative(state: dict[str, torch.Tensor]) -> None:
        state["bn.running_var"][3] = -1

    assert refusal(_weights(tmp_path / "a.safetensors", nan), **NAMED).reason == "MODEL_NAN"
    assert refusal(_weights(tmp_path / "b.safetensors", negative), **NAMED).reason == "BATCH_NORM_INVALID"


def test_wrong_shapes(archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    error = refusal(archive, input_shape=(3, 9, 9))
    assert (error.reason, error.field) == ("INPUT_SHAPE_MISMATCH", "model.input_shape")
    path = _weights(tmp_path / "w.safetensors")
    assert refusal(path, architecture="resnet20").reason == "INPUT_SHAPE_REQUIRED"
    assert refusal(path, architecture="resnet20", input_shape=(1, 16, 16)).reason == "WEIGHTS_MISMATCH"


def test_folded_batch_norm(tmp_path: Path, refusal: Refusal) -> None:
    folded = nn.Sequential(
        fuse_conv_bn_eval(nn.Conv2d(3, 4, 3).eval(), nn.BatchNorm2d(4).eval()),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 3),
    )
    error = refusal(export(folded.eval(), (3, 8, 8), tmp_path / "folded.pt2"))
    assert error.reason == "BATCH_NORM_FOLDED"
    assert "before folding" in error.message

    state = {k: v for k, v in CifarResNet(3, 10).state_dict().items() if ".bn" not in k and not k.startswith("bn")}
    state = {k: v for k, v in state.items() if "shortcut.1" not in k}
    save_file(state, tmp_path / "folded.safetensors")
    assert refusal(tmp_path / "folded.safetensors", **NAMED).reason == "BATCH_NORM_FOLDED"


def test_no_batch_norm(tmp_path: Path, refusal: Refusal) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    assert refusal(export(plain.eval(), (3, 8, 8), tmp_path / "plain.pt2")).reason == "BATCH_NORM_MISSING"


def test_normalization_of_another_number_of_channels(archive: Path, refusal: Refusal) -> None:
    error = refusal(archive, normalization=common_pb2.Normalization(mean=[0.5], std=[0.2, 0.3]))
    assert error.reason == "NORMALIZATION_MISMATCH"
    assert error.field == "model.normalization.std"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_weights_of_integers_are_refused_by_name(refusal: Refusal, tmp_path: Path, dtype: torch.dtype) -> None:
    """Those of an architecture by name went on as they were, until PyTorch failed to compute with them."""
    state = {name: tensor.to(dtype) for name, tensor in resnet20(10, 1).state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    error = refusal(tmp_path / "x.safetensors", architecture="resnet20", input_shape=(1, 16, 16))
    assert (error.reason, error.field) == ("WEIGHTS_INVALID", "model.artifact")
    assert f"'conv.weight' has elements of type {dtype}" in error.message
