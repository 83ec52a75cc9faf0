"""Image folders: one folder per class."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services.common.datasets.base import Images, LabelledSet, limited
from services.common.datasets.preprocessing import Preprocessor
from services.common.errors import InvalidArgumentError

# Decoders of the formats that sets come in; the many others of the image library stay out of reach of untrusted files.
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp"})
GREY_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"CMYK", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr"})
FIELD = "dataset.path"


class ImageFolder(LabelledSet):
    """A folder with one folder per class, classes and files in the order of their names.

    Args:
        root: The dataset root; links in the folder may lead anywhere below it, and nowhere else.
        folder: The set's folder.
        limit: Images to use; 0 for all.
        preprocess: Steps from pixels to input.
        description: Name for reports.

    Raises:
        InvalidArgumentError: There are no class folders, a class has no image, or a link leads out of the root.
    """

    def __init__(self, root: Path, folder: Path, limit: int, preprocess: Preprocessor, description: str) -> None:
        if not folder.is_dir():
            raise InvalidArgumentError("an image folder must be a folder, not a file", field=FIELD)
        self._folder, self._preprocess = folder, preprocess
        classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not classes:
            raise InvalidArgumentError("the folder has no folders, one for each class", field=FIELD)
        self._files: list[Path] = []
        labels: list[int] = []
        for label, kind in enumerate(classes):
            files = _image_files(root.resolve(), kind)
            if not files:
                raise InvalidArgumentError(
                    f"class folder {kind.name!r} has no image with a suffix of {sorted(SUFFIXES)}", field=FIELD
                )
            self._files += files
            labels += [label] * len(files)
        count = limited(len(self._files), limit)
        super().__init__(description, np.array(labels[:count], np.int64))

    def _read(self, batch: int) -> Iterator[Images]:
        pending: list[Images] = []
        for file in self._files[: len(self)]:
            image = self._preprocess(self._decode(file)[np.newaxis])
            if pending and image.shape != pending[0].shape:
                raise InvalidArgumentError(
                    f"{file.relative_to(self._folder)} has {image.shape[1:]} channels, rows and columns after "
                    f"preprocessing, the images before it {pending[0].shape[1:]}; set resize, center_crop and channels",
                    field="dataset.preprocessing",
                )
            pending.append(image)
            if len(pending) == batch:
                yield np.concatenate(pending)
                pending = []
        if pending:
            yield np.concatenate(pending)

    def _decode(self, file: Path) -> NDArray[np.uint8]:
        """Return uint8 H×W×C pixels, C of 1 or 3."""
        name = file.relative_to(self._folder)
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.mode in GREY_MODES:
                    return np.asarray(image.convert("L"))[..., np.newaxis]
                if image.mode in COLOUR_MODES:
                    return np.asarray(image.convert("RGB"))
                mode = image.mode
        # The decoders tell of damaged files in all these ways.
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise InvalidArgumentError(f"{name} is not a readable image: {error}", field=FIELD) from error
        raise InvalidArgumentError(f"{name} has pixels of mode {mode!r}; save it with 8 bits per channel", field=FIELD)


def _image_files(root: Path, folder: Path) -> list[Path]:
    """Return the image files at any depth below ``folder``, sorted; raise for a link that leads out of ``root``."""
    if not folder.resolve().is_relative_to(root):
        raise InvalidArgumentError(f"{folder.name!r} is a link out of the dataset root", field=FIELD)
    found: list[Path] = []
    # Links to folders are not walked: they could form a circle.
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in names:
            file = Path(parent, name)
            if file.suffix.lower() not in SUFFIXES:
                continue
            if file.is_symlink() and not file.resolve().is_relative_to(root):
                raise InvalidArgumentError(f"{folder.name}/{name} is a link out of the dataset root", field=FIELD)
            found.append(file)
    return sorted(found)
