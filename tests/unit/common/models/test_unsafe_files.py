"""Files that would run code, or fill memory, when loaded as torch loads them."""

import json
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from services.common.errors import InvalidArgumentError
from tests.support.pt2 import Payload, edit_json, rewrite, with_pickled_constant

Refusal = Callable[..., InvalidArgumentError]
WEIGHTS = "data/weights/model_weights_config.json"


def _pickled_weight(archive: Path, target: Path, marker: Path) -> Path:
    torch.save(Payload(marker), target)
    payload = target.read_bytes()

    def edit(value: Any) -> None:
        next(iter(value["config"].values())).update(use_pickle=True, path_name="weight_evil")

    return rewrite(archive, target, {WEIGHTS: edit_json(edit)}, {"data/weights/weight_evil": payload})


def _evaluated_size(archive: Path, target: Path, marker: Path) -> Path:
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def edit(value: Any) -> None:
        for symbol in value["graph_module"]["graph"]["sym_int_values"].values():
            symbol["as_expr"]["expr_str"] = code
        for meta in value["graph_module"]["graph"]["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = code

    return rewrite(archive, target, {"models/model.json": edit_json(edit)})


def _pickled_inputs(archive: Path, target: Path, marker: Path) -> Path:
    torch.save(Payload(marker), target)
    payload = target.read_bytes()
    return rewrite(archive, target, {"data/sample_inputs/model.pt": lambda _: payload})


MAKERS = (with_pickled_constant, _pickled_weight, _evaluated_size, _pickled_inputs)


@pytest.mark.parametrize("make", MAKERS)
def test_payloads_are_real(make: Callable[..., Path], archive: Path, tmp_path: Path) -> None:
    """torch's own loader runs them; without this the tests below would prove nothing."""
    marker = tmp_path / "ran"
    path = make(archive, tmp_path / "evil.pt2", marker)
    with suppress(Exception):
        torch.export.load(path)
    assert marker.exists()


@pytest.mark.parametrize("make", MAKERS[:2])
def test_pickles_in_pt2_are_refused(make: Callable[..., Path], archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    marker = tmp_path / "ran"
    error = refusal(make(archive, tmp_path / "evil.pt2", marker))
    assert error.reason == "MODEL_UNSAFE_PICKLE"
    assert error.field == "model.artifact"
    assert not marker.exists()


@pytest.mark.parametrize("make", MAKERS[2:])
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
    def edit(value: Any) -> None:
        value["graph_module"]["graph"]["nodes"][-1]["target"] = "os.system"

    path = rewrite(archive, tmp_path / "evil.pt2", {"models/model.json": edit_json(edit)})
    assert refusal(path).reason == "MODEL_NOT_TRACEABLE"


def test_names_of_arguments_are_not_code(archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    """fx writes them into Python source, which it compiles and runs."""
    marker = tmp_path / "ran"

    def edit(value: Any) -> None:
        node = value["graph_module"]["graph"]["nodes"][-1]
        code = f"bias=__import__('pathlib').Path({str(marker)!r}).touch(), x"
        node["inputs"][-1]["name"] = code

    path = rewrite(archive, tmp_path / "evil.pt2", {"models/model.json": edit_json(edit)})
    assert refusal(path).reason == "MODEL_ARCHIVE_INVALID"
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ['x") or print("', "a b", "x;y", "", "class", "forward", "_modules", "__class__", "ähm", "x\n"]
)
def test_names_of_parameters_are_not_code(name: str, archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    """fx writes these too: a quote would end the string that it puts around them."""

    def rename(text: bytes) -> bytes:
        return text.replace(b'"stem.0.weight"', json.dumps(f"{name}.weight").encode())

    path = rewrite(archive, tmp_path / "evil.pt2", {"models/model.json": rename, WEIGHTS: rename})
    assert refusal(path).reason == "MODEL_ARCHIVE_INVALID"


def test_compressed_entries_are_refused(archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    path = rewrite(archive, tmp_path / "bomb.pt2", compression=zipfile.ZIP_DEFLATED)
    assert refusal(path).reason == "MODEL_ARCHIVE_INVALID"


def test_folders_outside_are_refused(archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    path = rewrite(archive, tmp_path / "evil.pt2", additions={"../outside": b"x"})
    assert refusal(path).reason == "MODEL_ARCHIVE_INVALID"


def test_path_of_a_tensor_stays_inside(archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    def edit(value: Any) -> None:
        next(iter(value["config"].values()))["path_name"] = "../weights/weight_0"

    path = rewrite(archive, tmp_path / "evil.pt2", {WEIGHTS: edit_json(edit)})
    assert refusal(path).reason == "MODEL_ARCHIVE_INVALID"


def test_sizes_beyond_the_data_are_refused(archive: Path, tmp_path: Path, refusal: Refusal) -> None:
    def edit(value: Any) -> None:
        meta = next(iter(value["config"].values()))["tensor_meta"]
        meta["sizes"] = [{"as_int": 1 << 20}, {"as_int": 1 << 20}]
        meta["strides"] = [{"as_int": 0}, {"as_int": 0}]

    path = rewrite(archive, tmp_path / "bomb.pt2", {WEIGHTS: edit_json(edit)})
    assert refusal(path).reason == "MODEL_TRUNCATED"
