"""IDX files (the format of MNIST and Fashion-MNIST), plain or gzip-compressed."""

import gzip
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from services.common.datasets.base import Images, LabelledSet, limited
from services.common.datasets.preprocessing import Preprocessor
from services.common.errors import InvalidArgumentError

UNSIGNED_BYTE = 0x08
MAX_ITEMS = 50_000_000
MAX_ITEM_BYTES = 64 << 20
IMAGES_SUFFIX, LABELS_SUFFIX = "-images-idx3-ubyte", "-labels-idx1-ubyte"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class IdxFile:
    """An IDX file of unsigned bytes whose header and length were checked.

    Attributes:
        path: The file.
        shape: Lengths of the axes, items first.
    """

    path: Path
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one item."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    def batches(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """Yield consecutive items, ``count`` at a time and fewer at the end, as uint8 arrays.

        Raises:
            InvalidArgumentError: The file was truncated or damaged since it was opened.
        """
        with _guarded(self.path) as stream:
            stream.read(4 + 4 * len(self.shape))
            for start in range(0, self.shape[0], count):
                items = min(count, self.shape[0] - start)
                data = stream.read(items * self.item_bytes)
                if len(data) != items * self.item_bytes:
                    raise _error(self.path, "was truncated while it was read")
                yield np.frombuffer(data, np.uint8).reshape(items, *self.shape[1:])


def open_idx(path: Path, axes: int) -> IdxFile:
    """Check an IDX file of unsigned bytes.

    Args:
        path: The file; its content says whether it is compressed.
        axes: Number of axes that it must have: 3 for images, 1 for labels.

    Raises:
        InvalidArgumentError: The header is wrong, or the length differs from what the header says.
    """
    with _guarded(path) as stream:
        head = stream.read(4)
        if len(head) < 4 or head[:2] != b"\0\0":
            raise _error(path, "is not an IDX file: it must begin with two zero bytes")
        if head[2] != UNSIGNED_BYTE:
            raise _error(path, f"has elements of type 0x{head[2]:02x}; only unsigned bytes (0x08) are read")
        if head[3] != axes:
            raise _error(path, f"has {head[3]} axes instead of {axes}")
        lengths = stream.read(4 * axes)
        if len(lengths) < 4 * axes:
            raise _error(path, "ends within its header")
        file = IdxFile(path, struct.unpack(f">{axes}I", lengths))
        if not 1 <= file.shape[0] <= MAX_ITEMS:
            raise _error(path, f"declares {file.shape[0]} items; 1 to {MAX_ITEMS} are read")
        # Products of Python integers cannot overflow, unlike those of a fixed width.
        item_bytes = 1
        for length in file.shape[1:]:
            item_bytes *= length
        if not 1 <= item_bytes <= MAX_ITEM_BYTES:
            raise _error(path, f"declares items of {item_bytes} bytes; 1 to {MAX_ITEM_BYTES} are read")
        wanted, found = file.shape[0] * item_bytes, 0
        while found <= wanted and (chunk := stream.read(_CHUNK)):
            found += len(chunk)
        if found != wanted:
            less = "is truncated" if found < wanted else "is longer than it says"
            raise _error(path, f"{less}: the header declares {wanted} bytes of data")
        return file


class IdxSet(LabelledSet):
    """Images and labels of one split in a folder of IDX files.

    Args:
        root: The dataset root; links in the folder may lead anywhere below it, and nowhere else.
        folder: The folder.
        split: Prefix of the file names, or "" when there is only one.
        limit: Images to use; 0 for all.
        preprocess: Steps from pixels to input.
        description: Name for reports.

    Raises:
        InvalidArgumentError: Files are missing, ambiguous, damaged, or of different lengths.
    """

    def __init__(
        self, root: Path, folder: Path, split: str, limit: int, preprocess: Preprocessor, description: str
    ) -> None:
        prefix = _find_split(folder, split)
        self._images = open_idx(_pick(root, folder, prefix + IMAGES_SUFFIX), 3)
        labels = open_idx(_pick(root, folder, prefix + LABELS_SUFFIX), 1)
        if self._images.shape[0] != labels.shape[0]:
            raise InvalidArgumentError(
                f"{prefix!r} has {self._images.shape[0]} images but {labels.shape[0]} labels", field="dataset.path"
            )
        count = limited(labels.shape[0], limit)
        super().__init__(f"{description} ({prefix})", next(labels.batches(count)).astype(np.int64))
        self._preprocess = preprocess

    def _read(self, batch: int) -> Iterator[Images]:
        for pixels in self._images.batches(batch):
            yield self._preprocess(pixels[..., np.newaxis])


def _find_split(folder: Path, split: str) -> str:
    if not folder.is_dir():
        raise InvalidArgumentError("an IDX dataset must be a folder, not a file", field="dataset.path")
    names = {p.name.removesuffix(".gz") for p in folder.iterdir()}
    found = sorted(n.removesuffix(IMAGES_SUFFIX) for n in names if n.endswith(IMAGES_SUFFIX))
    if not found:
        raise InvalidArgumentError(
            f"the folder has no file *{IMAGES_SUFFIX} or *{IMAGES_SUFFIX}.gz", field="dataset.path"
        )
    if split and split not in found:
        raise InvalidArgumentError(f"the folder has no split {split!r}, only {found}", field="dataset.split")
    if not split and len(found) > 1:
        raise InvalidArgumentError(f"the folder has the splits {found}; name one", field="dataset.split")
    return split or found[0]


def _pick(root: Path, folder: Path, name: str) -> Path:
    """Return the plain file before the compressed one; a link out of the root is as good as no file."""
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file() and candidate.resolve().is_relative_to(root.resolve()):
            return candidate
    raise InvalidArgumentError(f"the folder has no file {name} or {name}.gz", field="dataset.path")


@contextmanager
def _guarded(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressing by content, and turn what can go wrong into errors that name the file."""
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not compressed:
                yield raw
                return
            with gzip.GzipFile(fileobj=raw) as stream:
                yield cast(BinaryIO, stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _error(path, f"is damaged gzip data: {error}") from error
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from error


def _error(path: Path, what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{path.name} {what}", field="dataset.path")
