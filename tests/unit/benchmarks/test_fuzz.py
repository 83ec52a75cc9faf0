"""A short form of the fuzzing, and the inputs on which the long form found defects."""

import io
import zipfile
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from numpy.lib import format as npy
from safetensors.torch import save_file

from benchmarks.fuzz.mutation import in_bytes
from benchmarks.fuzz.parsers import Parser, parsers
from benchmarks.fuzz.running import make_input, run
from granq.v1 import common_pb2
from services.common.datasets import open_dataset
from services.common.errors import InvalidArgumentError
from services.common.models.weights import read_state_dict

# Its inputs take 50 ms each, most of them as graphs that are read to their end.
LONG_ONLY = "torch.export program (.pt2)"
NAMES = [name for name, _ in parsers(Path()) if name != LONG_ONLY]


@pytest.mark.parametrize("name", NAMES)
def test_damaged_inputs_are_refused_in_words_of_ours(name: str, tmp_path: Path) -> None:
    found = run(dict(parsers(tmp_path))[name](), name, seed=1, count=200, seconds=0.4)
    assert found.defects == []
    assert found.inputs > 0


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_valid(name: str, tmp_path: Path) -> None:
    parser = dict(parsers(tmp_path))[name]()
    for seed in parser.seeds:
        parser.parse(seed)


def test_inputs_can_be_made_again() -> None:
    parser = Parser([bytes(100)], in_bytes, bytes)
    assert make_input(parser, "a", 0, 5) == make_input(parser, "a", 0, 5)
    assert len({make_input(parser, "a", 0, number) for number in range(20)}) > 5


def test_an_error_that_is_not_ours_is_a_defect() -> None:
    def parse(data: bytes) -> None:
        raise KeyError(len(data))

    found = run(Parser([b"abc"], lambda data, _rng: data, parse), "a", 0, 3)
    assert [defect.partition(" (")[0] for defect in found.defects] == [f"input {i}: KeyError: 3" for i in range(3)]


def test_every_cut_of_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    """Where a number was cut, torch let struct.error through."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    path = tmp_path / "cut.pth"
    for length in range(2, len(buffer.getvalue())):
        path.write_bytes(buffer.getvalue()[:length])
        with pytest.raises(InvalidArgumentError):
            read_state_dict(path, common_pb2.MODEL_FORMAT_STATE_DICT)


def test_a_plain_pickle_that_names_another_storage_is_refused(tmp_path: Path) -> None:
    """torch answered with AssertionError."""
    tensor = torch.ones(3)
    buffer = io.BytesIO()
    torch.save({"a": tensor}, buffer, _use_new_zipfile_serialization=False)
    key = str(tensor.untyped_storage()._cdata).encode()
    assert buffer.getvalue().count(key) == 2
    path = tmp_path / "other.pth"
    path.write_bytes(buffer.getvalue()[::-1].replace(key[::-1], (key[:-1] + b"x")[::-1], 1)[::-1])
    with pytest.raises(InvalidArgumentError) as caught:
        read_state_dict(path, common_pb2.MODEL_FORMAT_STATE_DICT)
    assert caught.value.reason == "MODEL_TRUNCATED"


def test_elements_that_pytorch_cannot_compute_with_are_refused(tmp_path: Path) -> None:
    """The least of them, asked for a variance, was NotImplementedError."""
    save_file({"bn.running_var": torch.ones(3, dtype=torch.uint32)}, tmp_path / "x.safetensors")
    with pytest.raises(InvalidArgumentError, match=r"torch\.uint32; save the weights as float32"):
        read_state_dict(tmp_path / "x.safetensors", common_pb2.MODEL_FORMAT_SAFETENSORS)


def test_a_header_of_an_array_that_never_ends_is_refused(tmp_path: Path) -> None:
    """NumPy answered with tokenize.TokenError."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 4, 4"
    array = npy.magic(1, 0) + len(header).to_bytes(2, "little") + header + bytes(16)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", array)
    dataset = common_pb2.Dataset(path="x.npz", format=common_pb2.DATASET_FORMAT_NPZ)
    with pytest.raises(InvalidArgumentError, match="damaged header"):
        open_dataset(dataset, tmp_path, cast("Any", None))
