import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from granq.v1 import common_pb2
from services.common.datasets import LabelledSet, open_dataset
from services.common.datasets.webdataset import split_name
from services.common.errors import InvalidArgumentError


def png(value: int, side: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, members: Iterable[tuple[str, bytes]], mode: Any = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def sample(key: str, value: int, label: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.json", b"{}"), (f"{key}.png", png(value)), (f"{key}.cls", label.encode())]


def opened(root: Path, path: str, **fields: Any) -> LabelledSet:
    dataset = common_pb2.Dataset(path=path, format=common_pb2.DATASET_FORMAT_WEBDATASET, **fields)
    return open_dataset(dataset, root, cast("Any", None))


def reds(data: LabelledSet, batch: int = 2) -> list[int]:
    batches = [images for images, _ in data.images(batch)]
    return [int(red) for red in np.rint(np.concatenate(batches)[:, 0, 0, 0] * 255)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shard(tmp_path / "set-000001.tar", [*sample("c/x", 30, "2\n")])
    shard(tmp_path / "set-000000.tar", [("README", b"hello"), *sample("a", 10, "0"), *sample("b", 20, "1")])
    (tmp_path / "notes.txt").write_text("not a shard")
    return tmp_path


def test_shards_are_read_in_the_order_of_their_names(folder: Path) -> None:
    data = opened(folder, ".")
    assert (data.labels.tolist(), reds(data)) == ([0, 1, 2], [10, 20, 30])
    assert reds(data) == [10, 20, 30]  # as often as wanted
    data.require((3, 4, 4), 3)
    one = opened(folder, "set-000001.tar")
    assert (one.labels.tolist(), reds(one)) == ([2], [30])


def test_behind_the_limit_nothing_is_read(folder: Path) -> None:
    # README, then three members of a: the fourth header ends it, the rest is gone.
    (folder / "set-000000.tar").write_bytes((folder / "set-000000.tar").read_bytes()[: 5 * 1024 + 700])
    (folder / "set-000001.tar").write_bytes(b"no tar file")
    data = opened(folder, ".", limit=1)
    assert (data.labels.tolist(), reds(data)) == ([0], [10])


def test_names_part_at_the_first_dot_of_the_last_component() -> None:
    assert split_name("a.b/c.seg.PNG") == ("a.b/c", "seg.png")
    assert split_name("README") == ("README", "")


def test_a_second_image_under_a_longer_suffix_is_another_kind(tmp_path: Path) -> None:
    shard(tmp_path / "s.tar", [("a.seg.png", png(9)), *sample("a", 10, "0")])
    assert reds(opened(tmp_path, "s.tar")) == [10]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png(1))], "1 images and 0 .cls"),
        ([("a.cls", b"1")], "0 images and 1 .cls"),
        ([("a.png", png(1)), ("a.jpg", png(1)), ("a.cls", b"1")], "2 images"),
        ([("a.png", png(1)), ("b.png", png(1)), ("a.cls", b"1"), ("b.cls", b"1")], "in a row"),
        ([("a.png", png(1)), ("a.cls", b"cat")], "digits"),
        ([("a.png", png(1)), ("a.cls", b"-1")], "digits"),
        ([("a.png", png(1)), ("a.cls", b"1" * 40)], "digits"),
        ([("../a.png", png(1)), ("../a.cls", b"1")], "leads out"),
        ([("/a.png", png(1)), ("/a.cls", b"1")], "leads out"),
        ([("x/../../a.png", png(1))], "leads out"),
        ([("notes.txt", b"")], "no images"),
        ([], "no images"),
    ],
)
def test_shards_that_are_refused(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    shard(tmp_path / "s.tar", members)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        opened(tmp_path, "s.tar")
    assert caught.value.field.startswith("dataset")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(InvalidArgumentError, match="link, a device"):
        opened(tmp_path, "s.tar")


def test_compressed_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "z.tar", sample("a", 1, "0"), "w:gz")
    shard(tmp_path / "whole.tar", sample("a", 1, "0"))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:1600])
    (tmp_path / "text.tar").write_text("no tar file " * 100)
    for name in ("z.tar", "cut.tar", "text.tar"):
        with pytest.raises(InvalidArgumentError, match=name):
            opened(tmp_path, name)


def test_an_undecodable_image_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "s.tar", [("a.png", b"no image"), ("a.cls", b"1")])
    with pytest.raises(InvalidArgumentError, match=r"s.tar:a.png"):
        reds(opened(tmp_path, "s.tar"))


def test_a_folder_without_shards_or_with_a_link_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(InvalidArgumentError, match=r"no \.tar"):
        opened(root, ".")
    shard(tmp_path / "s.tar", sample("a", 1, "0"))
    (root / "s.tar").symlink_to(tmp_path / "s.tar")
    with pytest.raises(InvalidArgumentError, match="link out"):
        opened(root, ".")


def test_damage_anywhere_in_the_headers_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "s.tar", [("a.png", png(1)), ("a.cls", b"1")])
    intact = (tmp_path / "s.tar").read_bytes()
    second = 512 + 512 * -(-len(png(1)) // 512)
    for position in (*range(0, 500, 2), *range(second, second + 500, 2)):
        damaged = bytearray(intact)
        damaged[position] ^= 0xFF
        (tmp_path / "s.tar").write_bytes(damaged)
        with pytest.raises(InvalidArgumentError):
            opened(tmp_path, "s.tar")


def test_a_damaged_header_between_samples_does_not_shorten_the_set(tmp_path: Path) -> None:
    shard(tmp_path / "s.tar", sample("a", 1, "0") + sample("b", 2, "1"))
    intact = (tmp_path / "s.tar").read_bytes()
    assert len(opened(tmp_path, "s.tar")) == 2
    third = intact.index(b"b.")
    for position in (third, third + 124, third + 150):
        damaged = bytearray(intact)
        damaged[position] ^= 0xFF
        (tmp_path / "s.tar").write_bytes(damaged)
        with pytest.raises(InvalidArgumentError, match=f"damaged at byte {third}"):
            opened(tmp_path, "s.tar")
