"""From stored pixels to a model's input."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from granq.v1 import common_pb2
from services.common.errors import InvalidArgumentError

FIELD = "dataset.preprocessing"
# Rec. 601 luma in 16-bit fixed point, rounded as Pillow does, so that a grey image made here equals its "L".
LUMA = np.array([19595, 38470, 7471], np.uint32)
MAX_SIDE = 32768
MAX_INPUT_VALUES = 16 << 20  # of one image; in float32 they take four bytes each, several times over


class Preprocessor:
    """Applies common.proto's Preprocessing, its steps in the order of the fields.

    Resize and crop follow the usual evaluation transform: the longer side is scaled by the same factor and rounded
    down, and the crop's offset is half the difference, rounded half to even.

    Args:
        config: The request's preprocessing.

    Raises:
        InvalidArgumentError: A mean or standard deviation is not finite, or not positive.

    Example:
        >>> config = common_pb2.Preprocessing(pad=1, channels=3, mean=[0.5], std=[0.5])
        >>> Preprocessor(config)(np.full((2, 2, 2, 1), 255, np.uint8)).shape
        (2, 3, 4, 4)
    """

    def __init__(self, config: common_pb2.Preprocessing) -> None:
        self._resize = config.resize if config.HasField("resize") else None
        self._crop = config.center_crop if config.HasField("center_crop") else None
        self._pad = config.pad
        self._channels = config.channels if config.HasField("channels") else None
        self._mean = _per_channel(config.mean, "mean", positive=False)
        self._std = _per_channel(config.std, "std", positive=True)

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return float32 N×C'×H'×W' for uint8 pixels N×H×W×C with C of 1 or 3.

        Raises:
            InvalidArgumentError: The crop is larger than the image, what is left is larger than any model's input, or
                the number of means or standard deviations does not match the channels.
        """
        if self._resize is not None:
            pixels = self._resized(pixels, self._resize)
        if self._crop is not None:
            pixels = self._cropped(pixels, self._crop)
        if self._pad:
            sides = (self._pad, self._pad)
            pixels = np.pad(pixels, ((0, 0), sides, sides, (0, 0)))
        if (count := math.prod(pixels.shape[1:])) > MAX_INPUT_VALUES:
            raise InvalidArgumentError(
                f"an image of {pixels.shape[1]}×{pixels.shape[2]} pixels has {count} values, more than the "
                f"{MAX_INPUT_VALUES} that a model may take; set resize and center_crop",
                field=FIELD,
            )
        pixels = _with_channels(pixels, self._channels)
        # float32 throughout, as training pipelines compute it: x / 255, minus the mean, over the deviation.
        result = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
        result /= np.float32(255)
        for name, values in (("mean", self._mean), ("std", self._std)):
            if values is None:
                continue
            if values.size not in (1, result.shape[1]):
                raise InvalidArgumentError(
                    f"{name} has {values.size} values, but the images have {result.shape[1]} channels",
                    field=f"{FIELD}.{name}",
                )
            column = values.reshape(1, -1, 1, 1)
            result = result - column if name == "mean" else result / column
        return result

    def _resized(self, pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
        height, width = pixels.shape[1:3]
        short, long = min(height, width), max(height, width)
        other = side * long // short
        if other > MAX_SIDE:
            raise InvalidArgumentError(
                f"resizing {height}×{width} pixels to a shorter side of {side} gives a side of {other} pixels",
                field=f"{FIELD}.resize",
            )
        size = (side, other) if width <= height else (other, side)
        grey = pixels.shape[3] == 1
        frames = pixels[..., 0] if grey else pixels
        resized = [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BILINEAR)) for f in frames]
        result = np.stack(resized)
        return result[..., np.newaxis] if grey else result

    def _cropped(self, pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
        height, width = pixels.shape[1:3]
        if side > height or side > width:
            raise InvalidArgumentError(
                f"center_crop is {side}, larger than the image of {height}×{width} pixels; resize it first",
                field=f"{FIELD}.center_crop",
            )
        top, left = round((height - side) / 2), round((width - side) / 2)
        return pixels[:, top : top + side, left : left + side]


def _with_channels(pixels: NDArray[np.uint8], channels: int | None) -> NDArray[np.uint8]:
    """Return N×H×W×C pixels as luminance (1) or colour (3); None leaves them as stored."""
    if channels is None or channels == pixels.shape[3]:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=3)
    luma = (pixels.astype(np.uint32) @ LUMA + 0x8000) >> 16
    return luma.astype(np.uint8)[..., np.newaxis]


def _per_channel(values: Sequence[float], name: str, *, positive: bool) -> NDArray[np.float32] | None:
    if not values:
        return None
    array = np.array(values, np.float32)
    if not np.isfinite(array).all() or (positive and not (array > 0).all()):
        wanted = "finite and above 0 in float32" if positive else "finite in float32"
        raise InvalidArgumentError(f"{name} must be {wanted}, not {list(values)}", field=f"{FIELD}.{name}")
    return array
