"""Encoded images (JPEG, PNG and the like), one file or stream each."""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services.common.datasets.base import Images
from services.common.datasets.preprocessing import Preprocessor
from services.common.errors import InvalidArgumentError

# Decoders of the formats that sets come in; the many others of the image library stay out of reach of untrusted files.
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp"})
GREY_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"CMYK", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr"})


def read_pictures(
    pictures: Iterable[tuple[str, Path | BinaryIO]], preprocess: Preprocessor, batch: int, field: str
) -> Iterator[Images]:
    """Decode and preprocess images one by one, and yield them ``batch`` at a time.

    Args:
        pictures: Name for errors, and the encoded image.
        preprocess: Steps from pixels to input.
        batch: Images to yield together.
        field: Request field that named the set, for errors.

    Raises:
        InvalidArgumentError: An image is damaged, or differs in size from the others of its batch.
    """
    pending: list[Images] = []
    for name, source in pictures:
        image = preprocess(decode(source, name, field)[np.newaxis])
        if pending and image.shape != pending[0].shape:
            raise InvalidArgumentError(
                f"{name} has {image.shape[1:]} channels, rows and columns after preprocessing, the images before it "
                f"{pending[0].shape[1:]}; set resize, center_crop and channels",
                field="dataset.preprocessing",
            )
        pending.append(image)
        if len(pending) == batch:
            yield np.concatenate(pending)
            pending = []
    if pending:
        yield np.concatenate(pending)


def decode(source: Path | BinaryIO, name: str, field: str) -> NDArray[np.uint8]:
    """Return uint8 H×W×C pixels, C of 1 or 3.

    Raises:
        InvalidArgumentError: The image is damaged, of another format, or has more than 8 bits per channel.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.mode in GREY_MODES:
                return np.asarray(image.convert("L"))[..., np.newaxis]
            if image.mode in COLOUR_MODES:
                return np.asarray(image.convert("RGB"))
            mode = image.mode
    # The decoders tell of damaged files in all these ways.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise InvalidArgumentError(f"{name} is not a readable image: {error}", field=field) from error
    raise InvalidArgumentError(f"{name} has pixels of mode {mode!r}; save it with 8 bits per channel", field=field)
