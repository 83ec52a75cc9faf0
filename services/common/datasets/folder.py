"""Image folders: one folder per class."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from services.common.datasets.base import Images, LabelledSet, limited
from services.common.datasets.pictures import SUFFIXES, read_pictures
from services.common.datasets.preprocessing import Preprocessor
from services.common.errors import InvalidArgumentError

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
        files = self._files[: len(self)]
        pictures = ((str(file.relative_to(self._folder)), file) for file in files)
        return read_pictures(pictures, self._preprocess, batch, FIELD)


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
