"""NumPy archives, streamed: neither array is ever held whole, except for the labels."""

import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from services.common.datasets.base import Images, LabelledSet, limited
from services.common.datasets.preprocessing import Preprocessor
from services.common.errors import InvalidArgumentError

MAX_ITEMS = 50_000_000
MAX_ITEM_BYTES = 256 << 20


class NpzSet(LabelledSet):
    """Arrays "images" and "labels" of a NumPy archive.

    Args:
        path: The archive.
        limit: Images to use; 0 for all.
        preprocess: Steps from uint8 pixels to input; float32 images are taken as they are.
        description: Name for reports.
        field: Request field that named the archive, for errors.

    Raises:
        InvalidArgumentError: The archive is damaged, an array is missing, holds objects, or has a wrong type or shape.
    """

    def __init__(self, path: Path, limit: int, preprocess: Preprocessor, description: str, field: str) -> None:
        self._path, self._field, self._preprocess = path, field, preprocess
        with self._member("images") as (_, shape, dtype):
            self._shape, self._dtype = shape, dtype
        pixels = dtype == np.uint8 and (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3)))
        if not pixels and not (dtype.kind == "f" and dtype.itemsize == 4 and len(shape) == 4):
            raise self._error(
                f"images must be uint8 N×H×W or N×H×W×C with 1 or 3 channels, or float32 N×C×H×W, not {dtype} {shape}"
            )
        with self._member("labels") as (stream, shape, dtype):
            if dtype.kind not in "iu" or len(shape) != 1:
                raise self._error(f"labels must be integers with one axis, not {dtype} with shape {shape}")
            if shape[0] != self._shape[0]:
                raise self._error(f"the archive has {self._shape[0]} images but {shape[0]} labels")
            stored = self._array(stream, dtype, (limited(shape[0], limit),))
        if stored.size and int(stored.max()) > np.iinfo(np.int64).max:
            raise self._error(f"labels must be class numbers, not {int(stored.max())}")
        super().__init__(description, stored.astype(np.int64))

    def _read(self, batch: int) -> Iterator[Images]:
        with self._member("images") as (stream, shape, dtype):
            for start in range(0, shape[0], batch):
                images = self._array(stream, dtype, (min(batch, shape[0] - start), *shape[1:]))
                if dtype == np.uint8:
                    pixels = images.view(np.uint8)
                    yield self._preprocess(pixels if pixels.ndim == 4 else pixels[..., np.newaxis])
                    continue
                floats = images.astype(np.float32)
                if not np.isfinite(floats).all():
                    raise self._error("images must be finite numbers; there are infinities or NaN")
                yield floats

    def _array(self, stream: IO[bytes], dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        data = stream.read(size)
        if len(data) != size:
            raise self._error("an array is truncated")
        return np.frombuffer(data, dtype).reshape(shape)

    @contextmanager
    def _member(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[np.generic]]]:
        """Open one array and give its stream, behind the header, with shape and dtype."""
        try:
            with zipfile.ZipFile(self._path) as archive:
                try:
                    info = archive.getinfo(f"{name}.npy")
                except KeyError:
                    raise self._error(f"the archive has no array {name!r}, only {archive.namelist()[:10]}") from None
                with archive.open(info) as stream:
                    shape, dtype = self._header(stream, name)
                    size = dtype.itemsize
                    for length in shape:
                        size *= length
                    if info.file_size != stream.tell() + size:
                        raise self._error(f"{name} declares {size} bytes of data, which is not what it holds")
                    yield stream, shape, dtype
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            # zipfile tells of encryption by RuntimeError and of unknown compression by NotImplementedError.
            raise self._error(f"not a readable NumPy archive: {error}") from error
        except OSError as error:
            raise self._error(f"the archive cannot be read: {error.strerror}") from error

    def _header(self, stream: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
        try:
            version = npy.read_magic(stream)
            if version != (1, 0):
                # Later versions exist for structured types, and their headers may be gigabytes long.
                raise ValueError(f"version {version} is not read")
            shape, fortran, dtype = npy.read_array_header_1_0(stream)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError) as error:
            raise self._error(f"{name} has a damaged header: {error}") from error
        if dtype.hasobject:
            raise self._error(f"{name} holds Python objects, which are refused because reading them could run code")
        if fortran and len(shape) > 1:
            raise self._error(f"{name} is stored column by column; save numpy.ascontiguousarray of it")
        items, item_bytes = (shape[0] if shape else 0), dtype.itemsize
        for length in shape[1:]:
            item_bytes *= length
        if not 1 <= items <= MAX_ITEMS or not 1 <= item_bytes <= MAX_ITEM_BYTES:
            raise self._error(
                f"{name} has shape {shape}: 1 to {MAX_ITEMS} items of at most {MAX_ITEM_BYTES} bytes are read"
            )
        return shape, dtype

    def _error(self, message: str) -> InvalidArgumentError:
        return InvalidArgumentError(message, field=self._field)
