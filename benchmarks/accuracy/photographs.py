"""Crops of photographs: natural images for models of which no labelled test set is at hand."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
LEAST_SHARE = 0.25  # of the shorter side: smaller crops are texture, in which a classifier recognizes nothing


def crops(
    folder: Path, count: int, size: tuple[int, int], mean: list[float], std: list[float], seed: int
) -> tuple[Tensor, int]:
    """Cut crops from the pictures of a folder and its subfolders, of all pictures equally many (±1).

    A crop has the sides' ratio of ``size``, covers between ``LEAST_SHARE`` and all of what fits, at a random place,
    half of them mirrored, and is resampled to ``size``. The same folder and seed give the same crops.

    Args:
        folder: Holds the pictures, JPEG, PNG or WebP.
        count: Number of crops.
        size: Height and width.
        mean: Of pixels/255, one or three values.
        std: Likewise.
        seed: Of places, sizes and mirroring.

    Returns:
        Crops float32 N×3×H×W, (pixels/255 − mean)/std, and the number of pictures.

    Raises:
        FileNotFoundError: the folder holds no picture.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no pictures ({', '.join(sorted(SUFFIXES))}) in {folder}")
    height, width = size
    shift, scale = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (mean, std))
    result = np.empty((count, 3, height, width), np.float32)
    for index, path in enumerate(paths):
        # A stream for each picture, so that a picture's crops do not depend on how many the others give.
        random = np.random.default_rng((seed, index))
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        largest = min(picture.width / width, picture.height / height)
        for place in range(index, count, len(paths)):
            zoom = largest * random.uniform(LEAST_SHARE, 1.0)
            left = random.uniform(0, picture.width - zoom * width)
            top = random.uniform(0, picture.height - zoom * height)
            box = (left, top, left + zoom * width, top + zoom * height)
            crop = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box), np.float32)
            crop = crop[:, ::-1] if random.random() < 0.5 else crop
            result[place] = (crop.transpose(2, 0, 1) / 255 - shift) / scale
    return torch.from_numpy(result), min(len(paths), count)
