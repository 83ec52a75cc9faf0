import os
import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from granq.v1 import common_pb2
from services.common.datasets import LabelledSet, open_dataset
from services.common.datasets.plain_pickle import PlainPickleError, load_plain
from services.common.errors import InvalidArgumentError
from tests.support.cifar_files import binary, images_and_labels, python2

TRAIN = [f"data_batch_{number}" for number in range(1, 6)]


def opened(root: Path, path: str, **fields: Any) -> LabelledSet:
    dataset = common_pb2.Dataset(path=path, format=common_pb2.DATASET_FORMAT_CIFAR, **fields)
    return open_dataset(dataset, root, cast("Any", None))


def pixels_of(data: LabelledSet, batch: int) -> np.ndarray:
    batches = list(data.images(batch))
    assert [len(x) for x, _ in batches[:-1]] == [batch] * (len(batches) - 1)
    stored: np.ndarray = np.rint(np.concatenate([x for x, _ in batches]) * 255).astype(np.uint8)
    return stored.reshape(-1, 3072)


def test_binary_parts_run_across_files(tmp_path: Path) -> None:
    parts = [images_and_labels(5, 10, seed) for seed in range(5)]
    for name, (pixels, labels) in zip(TRAIN, parts, strict=True):
        binary(tmp_path / "cifar-10-batches-bin" / f"{name}.bin", pixels, labels, coarse=False)
    binary(tmp_path / "cifar-10-batches-bin" / "test_batch.bin", *images_and_labels(3, 10, 9), coarse=False)
    for path in (".", "cifar-10-batches-bin"):
        train, test = opened(tmp_path, path, split="train"), opened(tmp_path, path)
        assert (len(train), len(test)) == (25, 3)
        np.testing.assert_array_equal(pixels_of(train, 4), np.concatenate([pixels for pixels, _ in parts]))
        assert train.labels.tolist() == [label for _, labels in parts for label in labels]
        assert "CIFAR-10 test" in test.description
        test.require((3, 32, 32), 10)
    limited = opened(tmp_path, ".", split="train", limit=7)
    np.testing.assert_array_equal(pixels_of(limited, 4)[5:], parts[1][0][:2])


def test_cifar_100_has_its_fine_labels(tmp_path: Path) -> None:
    pixels, labels = images_and_labels(6, 100)
    binary(tmp_path / "test.bin", pixels, labels, coarse=True)
    data = opened(tmp_path, ".", split="test")
    assert data.labels.tolist() == labels
    np.testing.assert_array_equal(pixels_of(data, 6), pixels)


@pytest.mark.parametrize(("name", "key", "classes"), [("test_batch", "labels", 10), ("test", "fine_labels", 100)])
def test_python_files_as_torchvision_downloads_them(tmp_path: Path, name: str, key: str, classes: int) -> None:
    pixels, labels = images_and_labels(7, classes)
    (tmp_path / name).write_bytes(python2(pixels, labels, key))
    data = opened(tmp_path, ".")
    assert data.labels.tolist() == labels
    np.testing.assert_array_equal(pixels_of(data, 3), pixels)
    # The reference reads it the way torchvision does.
    entry = pickle.loads((tmp_path / name).read_bytes(), encoding="latin1")
    np.testing.assert_array_equal(entry["data"], pixels)


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_python_files_written_anew(tmp_path: Path, protocol: int, order: Any) -> None:
    pixels, labels = images_and_labels(7, 10)
    content = {"data": np.array(pixels, order=order), "labels": labels}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=protocol))
    np.testing.assert_array_equal(pixels_of(opened(tmp_path, "."), 7), pixels)


class _Acts:
    def __init__(self, target: Any, *arguments: Any) -> None:
        self.call = target, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": _Acts(os.system, "touch acted")}, protocol=4),
        pickle.dumps({"data": _Acts(os.system, "touch acted")}, protocol=0),
        pickle.dumps({"data": _Acts(eval, "open('acted', 'w')")}, protocol=2),
        pickle.dumps({"data": np.array([Path()], dtype=object)}, protocol=4),
        pickle.dumps({"data": np.float64(1.0)}, protocol=4),
        pickle.dumps({"data": np.zeros((2, 3072), np.int64)}, protocol=4),
        pickle.dumps({"data": bytearray(4)}, protocol=5),
        pickle.dumps({"data": {1, 2}}, protocol=4),
        pickle.dumps([1, 2], protocol=4),
        b"\x80\x02}r\xff\xff\xff\xff.",  # room for four thousand million memo entries
        b"\x80\x02Pname\n.",  # a persistent id
        b"\x80\x02cnumpy\ndtype\n}U\x06__call__K\x01sb.",  # the state of a name
        b"\x80\x02cnumpy\nndarray\n)R.",  # NumPy's own constructor
        b"\x80\x02}U\x04dataT\xff\xff\xff\x7fabcs.",  # bytes that are not there
        b"",
    ],
)
def test_what_is_not_plain_data_is_refused_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlainPickleError):
        load_plain(content)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(InvalidArgumentError, match="binary version of CIFAR-10"):
        opened(tmp_path, ".")
    assert not (tmp_path / "acted").exists()


def test_damage_anywhere_is_refused_or_harmless() -> None:
    intact = python2(*images_and_labels(1, 10), "labels")
    head, tail = 250, 40
    refused = 0
    for position in (*range(head), *range(len(intact) - tail, len(intact))):
        for flip in (0x01, 0x10, 0xFF):
            damaged = bytearray(intact)
            damaged[position] ^= flip
            try:
                load_plain(bytes(damaged))
            except PlainPickleError:
                refused += 1
    assert refused > 200


def _python(tmp_path: Path, **content: Any) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=4))


def test_wrong_content_is_refused(tmp_path: Path) -> None:
    pixels, labels = images_and_labels(2, 10)
    for content, message in (
        ({"labels": labels}, "no array 'data'"),
        ({"data": pixels[:, :-1], "labels": labels}, "no array 'data'"),
        ({"data": pixels}, "no list 'labels'"),
        ({"data": pixels, "labels": labels[:1]}, "of 2 class numbers"),
        ({"data": pixels, "labels": [True, False]}, "class numbers"),
        ({"data": pixels, "labels": [0, 10]}, "label 10"),
        ({"data": pixels[:0], "labels": []}, "no images"),
    ):
        _python(tmp_path, **content)
        with pytest.raises(InvalidArgumentError, match=message) as caught:
            opened(tmp_path, ".")
        assert caught.value.field.startswith("dataset")


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no complete part 'train'"):
        opened(tmp_path, ".", split="train")
    with pytest.raises(InvalidArgumentError, match="parts train and test"):
        opened(tmp_path, ".", split="valid")
    (tmp_path / "test_batch.bin").write_bytes(bytes(3072))
    with pytest.raises(InvalidArgumentError, match="multiple of 3073"):
        opened(tmp_path, ".")
    (tmp_path / "test_batch.bin").write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(InvalidArgumentError, match="label 10"):
        opened(tmp_path, ".")
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073))
    (tmp_path / "test.bin").write_bytes(bytes(3074))
    with pytest.raises(InvalidArgumentError, match="both"):
        opened(tmp_path, ".")


def test_a_link_out_of_the_root_is_as_good_as_no_file(tmp_path: Path) -> None:
    (tmp_path / "outside.bin").write_bytes(bytes(3073))
    root = tmp_path / "root"
    root.mkdir()
    (root / "test_batch.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(InvalidArgumentError, match="no complete part"):
        opened(root, ".")
