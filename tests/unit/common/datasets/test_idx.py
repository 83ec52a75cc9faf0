import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from granq.v1 import common_pb2
from services.common.datasets import Preprocessor
from services.common.datasets.idx import IdxSet, open_idx
from services.common.errors import InvalidArgumentError

PIXELS = np.arange(5 * 3 * 4, dtype=np.uint8).reshape(5, 3, 4)


def encode(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_split(folder: Path, prefix: str, images: bytes, labels: bytes, suffix: str = "") -> None:
    (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(images)
    (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(labels)


def open_set(folder: Path, split: str = "", limit: int = 0) -> IdxSet:
    return IdxSet(folder, folder, split, limit, Preprocessor(common_pb2.Preprocessing()), "set")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_reads_all_images_in_order(tmp_path: Path, compress: bool, batch: int) -> None:
    images, labels = encode(PIXELS), encode(np.array([3, 1, 4, 1, 5], np.uint8))
    if compress:
        images, labels = gzip.compress(images), gzip.compress(labels)
    write_split(tmp_path, "t10k", images, labels, ".gz" if compress else "")
    data = open_set(tmp_path)
    batches = list(data.images(batch))
    assert [len(x) for x, _ in batches[:-1]] == [batch] * (len(batches) - 1)
    got = np.concatenate([x for x, _ in batches])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, PIXELS[:, np.newaxis].astype(np.float32) / np.float32(255))
    assert np.concatenate([y for _, y in batches]).tolist() == [3, 1, 4, 1, 5]
    assert (len(data), data.description) == (5, "set (t10k)")


def test_limit_cuts_within_a_batch(tmp_path: Path) -> None:
    write_split(tmp_path, "t10k", encode(PIXELS), encode(np.zeros(5, np.uint8)))
    assert [x.shape for x, _ in open_set(tmp_path, limit=3).images(2)] == [(2, 1, 3, 4), (1, 1, 3, 4)]


def test_splits_are_named_when_ambiguous(tmp_path: Path) -> None:
    for prefix in ("train", "t10k"):
        write_split(tmp_path, prefix, encode(PIXELS), encode(np.zeros(5, np.uint8)))
    with pytest.raises(InvalidArgumentError, match=r"\['t10k', 'train'\]") as caught:
        open_set(tmp_path)
    assert caught.value.field == "dataset.split"
    assert len(open_set(tmp_path, "train")) == 5
    with pytest.raises(InvalidArgumentError, match="no split 'val'"):
        open_set(tmp_path, "val")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (encode(PIXELS)[:-1], "truncated"),
        (encode(PIXELS) + b"x", "longer than it says"),
        (encode(PIXELS)[:10], "within its header"),
        (encode(PIXELS[0]), "2 axes instead of 3"),
        (b"\0\0\x0d\x03" + encode(PIXELS)[4:], "0x0d"),
        (b"PK\x03\x04", "two zero bytes"),
        (b"", "two zero bytes"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 0, 3, 4), "declares 0 items"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 1, 2**32 - 1, 2**32 - 1), "items of"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 1, 1), "items; 1 to"),
        (gzip.compress(encode(PIXELS), mtime=0)[:-9], "damaged gzip"),
        (gzip.compress(encode(PIXELS), mtime=0)[:-8] + bytes(8), "damaged gzip"),
        (encode(PIXELS[:4]), "4 images but 5 labels"),
    ],
)
def test_refuses_damaged_images(tmp_path: Path, images: bytes, message: str) -> None:
    write_split(tmp_path, "t10k", images, encode(np.zeros(5, np.uint8)))
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        open_set(tmp_path)
    assert caught.value.field == "dataset.path"


def test_missing_labels_are_named(tmp_path: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(encode(PIXELS))
    with pytest.raises(InvalidArgumentError, match="no file t10k-labels-idx1-ubyte"):
        open_set(tmp_path)
    with pytest.raises(InvalidArgumentError, match="must be a folder"):
        open_set(tmp_path / "t10k-images-idx3-ubyte")


def test_truncation_after_opening_is_reported(tmp_path: Path) -> None:
    write_split(tmp_path, "t10k", encode(PIXELS), encode(np.zeros(5, np.uint8)))
    data = open_set(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(encode(PIXELS)[:-5])
    with pytest.raises(InvalidArgumentError, match="truncated while it was read"):
        list(data.images(4))


def test_link_out_of_the_root_is_no_file(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    write_split(outside, "t10k", encode(PIXELS), encode(np.zeros(5, np.uint8)))
    for file in outside.iterdir():
        (inside / file.name).symlink_to(file)
    with pytest.raises(InvalidArgumentError, match="no file"):
        open_set(inside)


HEADERS = st.builds(
    lambda kind, axes, lengths, rest: (
        bytes([0, 0, kind, axes]) + b"".join(struct.pack(">I", n) for n in lengths) + rest
    ),
    st.sampled_from([8, 9, 13]),
    st.integers(0, 4),
    st.lists(st.integers(0, 5) | st.integers(0, 2**32 - 1), max_size=4),
    st.binary(max_size=130),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | HEADERS | HEADERS.map(gzip.compress), axes=st.sampled_from([1, 3]))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, axes: int) -> None:
    path = tmp_path / "any"
    path.write_bytes(content)
    try:
        file = open_idx(path, axes)
        read = np.concatenate(list(file.batches(3)))
    except InvalidArgumentError:
        return
    assert read.shape == file.shape
    raw = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    assert encode(read) == raw
