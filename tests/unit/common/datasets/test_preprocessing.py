import numpy as np
import pytest
from PIL import Image

from granq.v1 import common_pb2
from services.common.datasets import Preprocessor
from services.common.errors import InvalidArgumentError

RANDOM = np.random.default_rng(7)


def run(pixels: np.ndarray, **config: object) -> np.ndarray:
    return Preprocessor(common_pb2.Preprocessing(**config))(pixels)  # type: ignore[arg-type]


def test_without_steps_pixels_are_divided_by_255() -> None:
    pixels = RANDOM.integers(0, 256, (2, 3, 4, 3), np.uint8)
    got = run(pixels)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))


def test_padding_is_black_before_normalization() -> None:
    pixels = np.full((1, 28, 28, 1), 255, np.uint8)
    got = run(pixels, pad=2, channels=3, mean=[0.2860], std=[0.3530])
    assert got.shape == (1, 3, 32, 32)
    mean, std = np.float32(0.2860), np.float32(0.3530)
    assert np.all(got[:, :, :2] == (np.float32(0) - mean) / std)
    assert np.all(got[:, :, 2:30, 2:30] == (np.float32(1) - mean) / std)


def test_mean_and_std_per_channel() -> None:
    pixels = np.full((1, 1, 1, 3), 51, np.uint8)
    got = run(pixels, mean=[0.1, 0.2, 0.3], std=[1, 2, 4])
    np.testing.assert_allclose(got.ravel(), [0.1, 0.0, -0.025], atol=1e-7)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 33)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_equals_pillow(shape: tuple[int, int], channels: int) -> None:
    pixels = RANDOM.integers(0, 256, (1, *shape, channels), np.uint8)
    got = run(pixels, resize=20)
    height, width = shape
    size = (20, 20 * height // width) if width <= height else (20 * width // height, 20)
    image = Image.fromarray(pixels[0, :, :, 0] if channels == 1 else pixels[0])
    wanted = np.asarray(image.resize(size, Image.Resampling.BILINEAR)).reshape(size[1], size[0], channels)
    np.testing.assert_array_equal(got[0], wanted.transpose(2, 0, 1).astype(np.float32) / np.float32(255))


def test_resize_down_is_antialiased() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[np.newaxis, ..., np.newaxis]
    assert abs(run(board, resize=8) - 0.5).max() < 0.02


@pytest.mark.parametrize(("height", "side", "top"), [(7, 4, 2), (8, 4, 2), (9, 4, 2), (5, 2, 2), (4, 4, 0)])
def test_center_crop(height: int, side: int, top: int) -> None:
    pixels = np.arange(height, dtype=np.uint8).reshape(1, height, 1, 1).repeat(height, 2)
    got = run(pixels, center_crop=side) * 255
    assert got.shape == (1, 1, side, side)
    assert round(float(got[0, 0, 0, 0])) == top


def test_luminance_equals_pillow() -> None:
    pixels = RANDOM.integers(0, 256, (1, 64, 64, 3), np.uint8)
    grey = np.asarray(Image.fromarray(pixels[0]).convert("L"))
    np.testing.assert_array_equal(np.rint(run(pixels, channels=1)[0, 0] * 255), grey)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"mean": [0.1, 0.2]}, "dataset.preprocessing.mean"),
        ({"std": [0.1, 0.2]}, "dataset.preprocessing.std"),
        ({"mean": [float("nan")]}, "dataset.preprocessing.mean"),
        ({"std": [1e-60]}, "dataset.preprocessing.std"),
        ({"center_crop": 5}, "dataset.preprocessing.center_crop"),
    ],
)
def test_impossible_steps_name_the_field(config: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        run(np.zeros((1, 4, 4, 3), np.uint8), **config)
    assert caught.value.field == field


def test_resize_of_a_sliver_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="shorter side"):
        run(np.zeros((1, 1, 5000, 1), np.uint8), resize=8192)


def test_more_values_than_a_model_may_take_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="set resize and center_crop") as caught:
        run(np.zeros((1, 4097, 4096, 1), np.uint8))
    assert caught.value.field == "dataset.preprocessing"
    assert run(np.zeros((1, 4097, 4096, 1), np.uint8), center_crop=8).shape == (1, 1, 8, 8)
