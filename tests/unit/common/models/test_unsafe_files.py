"""Files that would run code, or fill memory, when loaded as torch loads them."""

import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from services.common.errors import InvalidArgumentError
from tests.support import hostile_models
from tests.support.hostile_models import WITH_CODE
from tests.support.pt2 import Payload

Refusal = Callable[..., InvalidArgumentError]


@pytest.mark.parametrize("make", WITH_CODE)
def test_payloads_are_real(make: Callable[..., Path], archive: Path, tmp_path: Path) -> None:
    """torch's own loader runs them; without this the tests below would prove nothing."""
    marker = tmp_path / "ran"
    path = make(archive, tmp_path / "evil.pt2", marker)
    with suppress(Exception):
        torch.export.load(path)
    assert marker.exists()


@pytest.mark.parametrize("make", WITH_CODE[:2])
def test_pickles_in_pt2_are_refused(make: Callable[..., Path], archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    marker = tmp_path / "ran"
    error = refusal(make(archive, tmp_path / "evil.pt2", marker))
    assert error.reason == "MODEL_UNSAFE_PICKLE"
    assert error.field == "model.artifact"
    assert not marker.exists()


@pytest.mark.parametrize("make", WITH_CODE[2:])
def test_what_is_not_needed_is_not_read(
    make: Callable[..., Path], archive: Path, tmp_path: Path, load: Callable[..., Any]
) -> None:
    marker = tmp_path / "ran"
    load(make(archive, tmp_path / "evil.pt2", marker))
    assert not marker.exists()


def test_state_dict_with_code_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save({"conv.weight": Payload(marker)}, path)
    error = refusal(path, architecture="resnet20", input_shape=(3, 32, 32))
    assert error.reason == "MODEL_UNSAFE_PICKLE"
    assert "safetensors" in error.message
    assert not marker.exists()


def test_bare_pickle_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Payload(marker)))
    error = refusal(path, architecture="resnet20", input_shape=(3, 32, 32))
    assert error.reason in ("MODEL_UNSAFE_PICKLE", "MODEL_TRUNCATED")
    assert not marker.exists()


def test_operators_outside_aten_are_refused(archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    path = hostile_models.foreign_operator(archive, tmp_path / "evil.pt2", tmp_path)
    assert refusal(path).reason == "MODEL_NOT_TRACEABLE"


def test_names_of_arguments_are_not_code(archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    marker = tmp_path / "ran"
    path = hostile_models.code_as_argument_name(archive, tmp_path / "evil.pt2", marker)
    assert refusal(path).reason == "MODEL_ARCHIVE_INVALID"
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ['x") or print("', "a b", "x;y", "", "class", "forward", "_modules", "__class__", "ähm", "x\n"]
)
def test_names_of_parameters_are_not_code(name: str, archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    path = hostile_models.renamed_parameter(archive, tmp_path / "evil.pt2", name)
    assert refusal(path).reason == "MODEL_ARCHIVE_INVALID"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hostile_models.compressed, "MODEL_ARCHIVE_INVALID"),
        (hostile_models.entry_outside, "MODEL_ARCHIVE_INVALID"),
        (hostile_models.tensor_outside, "MODEL_ARCHIVE_INVALID"),
        (hostile_models.huge_shape, "MODEL_TRUNCATED"),
    ],
)
def test_archives_that_lead_outside_or_lie_are_refused(
    make: hostile_models.Make, reason: str, archive: Path, tmp_path: Path, refusal: Refusal
) -> None:
    assert refusal(make(archive, tmp_path / "evil.pt2", tmp_path)).reason == reason
