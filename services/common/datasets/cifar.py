"""CIFAR-10 and CIFAR-100 as published: binary files, or the Python files that torchvision downloads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.common.datasets.base import Images, LabelledSet, limited, regrouped
from services.common.datasets.plain_pickle import PlainPickleError, load_plain
from services.common.datasets.preprocessing import Preprocessor
from services.common.errors import InvalidArgumentError

SIDE, PIXELS = 32, 3 * 32 * 32
MAX_FILE_BYTES = 512 << 20
FIELD = "dataset.path"
_ROWS = 2048  # of a binary file that are read together


@dataclass(frozen=True)
class Layout:
    """How one of the sets is laid out in files.

    Attributes:
        name: The set.
        folder: Name of the folder that the published archive unpacks to.
        classes: Number of classes.
        parts: File names of each part.
        label: Binary: number of bytes before the pixels, the last of which is the label. Python: its key.
    """

    name: str
    folder: str
    classes: int
    parts: dict[str, tuple[str, ...]]
    label: int | str

    def read(self, path: Path) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Yield consecutive images of a file, as pixels N×3×32×32, and their labels N.

        Raises:
            InvalidArgumentError: The file is damaged, or no file of this set.
        """
        rows = self._binary(path, self.label) if isinstance(self.label, int) else self._python(path, self.label)
        for pixels, labels in rows:
            if labels.size and int(labels.max()) >= self.classes:
                raise _error(path, f"has the label {int(labels.max())}; {self.name} has {self.classes} classes")
            yield pixels.reshape(-1, 3, SIDE, SIDE), labels

    def _binary(self, path: Path, before: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        row = before + PIXELS
        try:
            with path.open("rb") as stream:
                while data := stream.read(_ROWS * row):
                    if len(data) % row:
                        raise _error(path, f"is no file of {self.name}: it must hold a multiple of {row} bytes")
                    table = np.frombuffer(data, np.uint8).reshape(-1, row)
                    yield table[:, before:], table[:, before - 1]
        except OSError as error:
            raise _error(path, f"cannot be read: {error.strerror}") from error

    def _python(self, path: Path, key: str) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise _error(path, f"has more than {MAX_FILE_BYTES} bytes")
            content = load_plain(path.read_bytes())
        except OSError as error:
            raise _error(path, f"cannot be read: {error.strerror}") from error
        except PlainPickleError as error:
            remedy = f"get the binary version of {self.name}, which needs no unpickling"
            raise _error(path, f"is not the published file, and is not unpickled: {error}; {remedy}") from error
        pixels, labels = content.get("data"), content.get(key)
        if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
            raise _error(path, f"has no array 'data' of N×{PIXELS} bytes")
        numbers = isinstance(labels, list) and all(type(label) is int and 0 <= label <= 255 for label in labels)
        if not isinstance(labels, list) or not numbers or len(labels) != len(pixels):
            raise _error(path, f"has no list {key!r} of {len(pixels)} class numbers")
        yield pixels, np.array(labels, np.uint8)


def _layouts() -> Iterator[Layout]:
    batches = tuple(f"data_batch_{number}" for number in range(1, 6))
    ten: dict[str, tuple[str, ...]] = {"train": batches, "test": ("test_batch",)}
    hundred: dict[str, tuple[str, ...]] = {"train": ("train",), "test": ("test",)}
    for parts, name, folders, classes, label in (
        (ten, "CIFAR-10", ("cifar-10-batches-bin", "cifar-10-batches-py"), 10, (1, "labels")),
        (hundred, "CIFAR-100", ("cifar-100-binary", "cifar-100-python"), 100, (2, "fine_labels")),
    ):
        binary = {part: tuple(f"{file}.bin" for file in files) for part, files in parts.items()}
        yield Layout(name, folders[0], classes, binary, label[0])
        yield Layout(name, folders[1], classes, parts, label[1])


LAYOUTS = tuple(_layouts())
"""The binary form of each set before its Python form."""


class CifarSet(LabelledSet):
    """One part of CIFAR-10 or CIFAR-100; CIFAR-100 with its 100 fine labels.

    Args:
        root: The dataset root; links in the folder may lead anywhere below it, and nowhere else.
        folder: The folder with the files, or the one around it.
        split: "train" or "test"; "" for "test".
        limit: Images to use; 0 for all.
        preprocess: Steps from pixels to input.
        description: Name for reports.

    Raises:
        InvalidArgumentError: Files are missing, damaged, of both sets, or would have to be unpickled to be read.
    """

    def __init__(
        self, root: Path, folder: Path, split: str, limit: int, preprocess: Preprocessor, description: str
    ) -> None:
        part = split or "test"
        if part not in ("train", "test"):
            raise InvalidArgumentError(f"CIFAR has the parts train and test, not {split!r}", field="dataset.split")
        self._layout, self._files = _find(root.resolve(), folder, part)
        self._preprocess = preprocess
        found = [labels for file in self._files for _, labels in self._layout.read(file)]
        labels = np.concatenate([np.empty(0, np.uint8), *found])
        count = limited(len(labels), limit)
        super().__init__(f"{description} ({self._layout.name} {part})", labels[:count].astype(np.int64))

    def _read(self, batch: int) -> Iterator[Images]:
        chunks = (pixels for file in self._files for pixels, _ in self._layout.read(file))
        for pixels in regrouped(chunks, batch):
            yield self._preprocess(pixels.transpose(0, 2, 3, 1))


def _find(root: Path, folder: Path, part: str) -> tuple[Layout, list[Path]]:
    """Return the layout whose files are there, with the files of one part."""
    found: list[tuple[Layout, list[Path]]] = []
    for layout in LAYOUTS:
        for place in (folder, folder / layout.folder):
            files = [place / name for name in layout.parts[part]]
            if all(file.is_file() and file.resolve().is_relative_to(root) for file in files):
                found.append((layout, files))
                break
    if not found:
        wanted = "; ".join(f"{layout.name}: {', '.join(layout.parts[part])}" for layout in LAYOUTS)
        raise InvalidArgumentError(f"the folder has no complete part {part!r} of CIFAR ({wanted})", field=FIELD)
    if len({layout.name for layout, _ in found}) > 1:
        raise InvalidArgumentError("the folder has both CIFAR-10 and CIFAR-100; name the folder of one", field=FIELD)
    return found[0]


def _error(path: Path, what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{path.name} {what}", field=FIELD)
