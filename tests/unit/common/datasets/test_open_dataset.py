import io
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from granq.v1 import artifacts_pb2, common_pb2
from services.common.datasets import LabelledSet, open_dataset
from services.common.errors import FailedPreconditionError, InvalidArgumentError

NPZ, FOLDER, IDX = (
    common_pb2.DATASET_FORMAT_NPZ,
    common_pb2.DATASET_FORMAT_IMAGE_FOLDER,
    common_pb2.DATASET_FORMAT_IDX,
)
PIXELS = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
LABELS = np.array([2, 0, 1, 2])


class OneFileStore:
    """Stands for an artifact store that holds one blob."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def local_path(self, digest: str) -> Path:
        return self._path


def opened(root: Path, path: str, kind: Any, **fields: Any) -> LabelledSet:
    dataset = common_pb2.Dataset(path=path, format=kind, **fields)
    return open_dataset(dataset, root, cast("Any", OneFileStore(root)))


def everything(data: LabelledSet, batch: int = 3) -> tuple[np.ndarray, list[int]]:
    batches = list(data.images(batch))
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches]).tolist()


# --- NPZ


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, ">i4"])
def test_npz_pixels(tmp_path: Path, save: Any, dtype: Any) -> None:
    save(tmp_path / "set.npz", images=PIXELS, labels=LABELS.astype(dtype))
    data = opened(tmp_path, "set.npz", NPZ, preprocessing=common_pb2.Preprocessing(pad=1))
    images, labels = everything(data)
    assert images.shape == (4, 1, 7, 8)
    np.testing.assert_array_equal(images[:, 0, 1:-1, 1:-1], PIXELS.astype(np.float32) / np.float32(255))
    assert labels == LABELS.tolist()
    data.require((1, 7, 8), 3)


def test_npz_colour_is_channels_last(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    np.savez(tmp_path / "set.npz", images=colour, labels=np.zeros(2, int))
    images, _ = everything(opened(tmp_path, "set.npz", NPZ))
    np.testing.assert_array_equal(np.rint(images * 255), colour.transpose(0, 3, 1, 2))


def test_npz_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    floats = np.random.default_rng(0).normal(size=(4, 2, 3, 3)).astype(np.float32)
    np.savez(tmp_path / "set.npz", images=floats, labels=LABELS)
    images, _ = everything(opened(tmp_path, "set.npz", NPZ, preprocessing=common_pb2.Preprocessing(mean=[0.5])))
    np.testing.assert_array_equal(images, floats)


def test_npz_artifact(tmp_path: Path) -> None:
    np.savez(tmp_path / "blob.npz", images=PIXELS, labels=LABELS)
    artifact = artifacts_pb2.Artifact(digest="sha256:" + "0" * 64)
    store = cast("Any", OneFileStore(tmp_path / "blob.npz"))
    data = open_dataset(common_pb2.Dataset(artifact=artifact, format=NPZ), tmp_path, store)
    assert (len(data), data.description) == (4, artifact.digest)
    with pytest.raises(InvalidArgumentError, match="NumPy archive"):
        open_dataset(common_pb2.Dataset(artifact=artifact, format=IDX), tmp_path, store)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS}, "no array 'images'"),
        ({"images": PIXELS}, "no array 'labels'"),
        ({"images": PIXELS, "labels": LABELS[:3]}, "4 images but 3 labels"),
        ({"images": PIXELS, "labels": LABELS.astype(float)}, "integers"),
        ({"images": PIXELS, "labels": LABELS - 1}, "negative"),
        ({"images": PIXELS, "labels": np.array([0, 0, 0, 2**63], np.uint64)}, "class numbers"),
        ({"images": PIXELS.astype(np.int32), "labels": LABELS}, "uint8 N×H×W"),
        ({"images": np.zeros((4, 2, 2, 2), np.uint8), "labels": LABELS}, "uint8 N×H×W"),
        ({"images": np.array([None] * 4), "labels": LABELS}, "Python objects"),
        ({"images": np.asfortranarray(PIXELS), "labels": LABELS}, "ascontiguousarray"),
        ({"images": PIXELS[:0], "labels": LABELS[:0]}, "shape"),
    ],
)
def test_npz_refuses(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "set.npz", **cast("Any", arrays))
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        opened(tmp_path, "set.npz", NPZ)
    assert caught.value.field.startswith("dataset")


def test_npz_refuses_infinities(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=np.full((4, 1, 2, 2), np.inf, np.float32), labels=LABELS)
    with pytest.raises(InvalidArgumentError, match="finite"):
        everything(opened(tmp_path, "set.npz", NPZ))


def test_npz_damage_anywhere_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=PIXELS, labels=LABELS)
    intact = buffer.getvalue()
    refused = 0
    for position in range(0, len(intact), 3):
        damaged = bytearray(intact)
        damaged[position] ^= 0xFF
        (tmp_path / "set.npz").write_bytes(damaged)
        try:
            images, _ = everything(opened(tmp_path, "set.npz", NPZ))
        except InvalidArgumentError:
            refused += 1
        else:
            # Some bytes of a zip file, such as dates, mean nothing here.
            np.testing.assert_array_equal(np.rint(images[:, 0] * 255), PIXELS)
    assert refused > len(intact) / 9
    for end in range(0, len(intact), 17):
        (tmp_path / "set.npz").write_bytes(intact[:end])
        with pytest.raises(InvalidArgumentError):
            everything(opened(tmp_path, "set.npz", NPZ))


def test_npz_with_a_wrong_size_in_the_header(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, PIXELS)
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("images.npy", buffer.getvalue()[:-3])
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, LABELS)
        archive.writestr("labels.npy", buffer.getvalue())
    with pytest.raises(InvalidArgumentError, match="declares 120 bytes"):
        opened(tmp_path, "set.npz", NPZ)


# --- image folders


def make_folder(root: Path) -> Path:
    folder = root / "photos"
    for number, kind in enumerate(("ant", "bee")):
        (folder / kind / "deep").mkdir(parents=True)
        for name in ("b.png", "a.JPG", "deep/c.webp"):
            Image.new("RGB", (8, 6), (number * 100, 50, 200)).save(folder / kind / name, lossless=True)
        (folder / kind / "notes.txt").write_text("not an image")
    return folder


def test_folder_classes_and_files_in_order(tmp_path: Path) -> None:
    make_folder(tmp_path)
    data = opened(tmp_path, "photos", FOLDER)
    images, labels = everything(data, 4)
    assert images.shape == (6, 3, 6, 8)
    assert labels == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(images[5, :, 0, 0] * 255, [100, 50, 200], atol=2)
    assert len(list(opened(tmp_path, "photos", FOLDER, limit=4).images(3))) == 2


def test_folder_modes(tmp_path: Path) -> None:
    for number, mode in enumerate(("1", "L", "LA", "P", "RGBA")):
        folder = tmp_path / mode / "x"
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4), (255, 255, 255)).convert("L" if mode == "1" else "RGB").convert(mode).save(
            folder / "i.png"
        )
        images, _ = everything(opened(tmp_path, mode, FOLDER))
        assert images.shape == (1, 1 if number < 3 else 3, 4, 4)
        assert images.min() == 1
    (tmp_path / "deep" / "x").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep" / "x" / "i.png")
    with pytest.raises(InvalidArgumentError, match="8 bits per channel"):
        everything(opened(tmp_path, "deep", FOLDER))


def test_folder_refuses(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    picture = folder / "ant" / "b.png"
    intact = picture.read_bytes()
    picture.write_bytes(intact[:-40])
    with pytest.raises(InvalidArgumentError, match=r"ant/b\.png is not a readable image"):
        everything(opened(tmp_path, "photos", FOLDER))
    picture.write_bytes(b"GIF89a")
    with pytest.raises(InvalidArgumentError, match=r"ant/b\.png"):
        everything(opened(tmp_path, "photos", FOLDER))
    Image.new("RGB", (9, 6)).save(picture)
    with pytest.raises(InvalidArgumentError, match="set resize"):
        everything(opened(tmp_path, "photos", FOLDER))
    (folder / "wasp").mkdir()
    with pytest.raises(InvalidArgumentError, match="'wasp' has no image"):
        opened(tmp_path, "photos", FOLDER)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgumentError, match="one for each class"):
        opened(tmp_path, "empty", FOLDER)


def test_single_sized_batches_must_agree(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    Image.new("RGB", (9, 6)).save(folder / "bee" / "b.png")
    with pytest.raises(InvalidArgumentError, match=r"3×6×8 and 3×6×9"):
        list(opened(tmp_path, "photos", FOLDER).images(1))


# --- paths and models


@pytest.mark.parametrize("path", ["../secret", "photos/../../secret", "/etc", "link", "photos/link", "missing", "a\0b"])
def test_paths_stay_under_the_root(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    make_folder(root)
    (tmp_path / "secret").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "photos" / "link").symlink_to("../../secret")
    with pytest.raises(InvalidArgumentError) as caught:
        opened(root, path, FOLDER)
    assert caught.value.field == "dataset.path"
    assert str(tmp_path) not in str(caught.value)


def test_links_within_the_root_are_followed(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "alias").symlink_to("photos")
    assert len(opened(tmp_path, "alias", FOLDER)) == 6


@pytest.mark.parametrize("link", ["ant/x.png", "wasp"])
def test_links_in_a_folder_may_not_leave_the_root(tmp_path: Path, link: str) -> None:
    folder = make_folder(tmp_path / "root")
    (tmp_path / "outside").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "outside" / "x.png")
    target = tmp_path / "outside"
    (folder / link).symlink_to(target / "x.png" if link.endswith("png") else target)
    with pytest.raises(InvalidArgumentError, match="link out of the dataset root"):
        opened(tmp_path / "root", "photos", FOLDER)


def test_missing_root_is_the_operators_fault(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="GRANQ_DATASET_ROOT"):
        opened(tmp_path / "nowhere", "set", FOLDER)


def test_require_names_the_mismatch(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=PIXELS, labels=LABELS)
    data = opened(tmp_path, "set.npz", NPZ)
    with pytest.raises(InvalidArgumentError, match="label 2, but the model has only the classes 0 to 1"):
        data.require((1, 5, 6), 2)
    with pytest.raises(InvalidArgumentError, match=r"1×5×6 after preprocessing, but the model takes 3×32×32") as caught:
        data.require((3, 32, 32), 3)
    assert caught.value.field == "dataset.preprocessing"


def test_fashion_mnist_has_its_published_counts(fashion_mnist: Path) -> None:
    data = opened(fashion_mnist, ".", IDX, split="t10k")
    assert np.bincount(data.labels).tolist() == [1000] * 10
    data.require((1, 28, 28), 10)
    assert sum(len(x) for x, _ in data.images(1000)) == 10000
