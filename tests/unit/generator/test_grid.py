"""Grids of synthetic images: which are shown, in which colours, and which are framed."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from services.generator.grid import CLASSES, IMAGES, SIDE, draw_grid
from services.generator.networks import ConditionalGenerator

STEP, LABEL = SIDE + 8, 40


def drawn(
    path: Path, images: torch.Tensor, labels: list[int], seen: list[int], classes: int = 3, bounded: bool = True
) -> Image.Image:
    """Draw a set; ``seen`` are the classes that the teacher sees. Black is −1 and white is 3, where that is known."""
    logits = torch.nn.functional.one_hot(torch.tensor(seen), classes).float()
    save_file({"images": images, "labels": torch.tensor(labels), "logits": logits}, path)
    channels = images.shape[1]
    pixel_range = (torch.full((channels,), -1.0), torch.full((channels,), 3.0)) if bounded else None
    generator = ConditionalGenerator((channels, 8, 8), classes, pixel_range)
    return Image.open(io.BytesIO(draw_grid(path, generator)))


def centre(picture: Image.Image, row: int, column: int) -> tuple[int, ...]:
    pixel = picture.getpixel((LABEL + column * STEP + STEP // 2, row * STEP + STEP // 2))
    assert isinstance(pixel, tuple)
    return pixel


def test_rows_are_classes_and_colours_are_those_of_the_pixels(tmp_path: Path) -> None:
    colours = torch.tensor([[-1.0, 1.0, 3.0], [3.0, 3.0, 3.0], [-1.0, -1.0, -1.0], [9.0, -9.0, 1.0]])
    images = colours.view(4, 3, 1, 1).expand(4, 3, 8, 8).contiguous()
    picture = drawn(tmp_path / "set", images, [2, 0, 2, 2], [2, 0, 1, 2])
    assert picture.size == (LABEL + IMAGES * STEP, 2 * STEP)  # class 1 does not occur
    assert centre(picture, 0, 0) == (255, 255, 255)
    assert [centre(picture, 1, column) for column in range(3)] == [(0, 128, 255), (0, 0, 0), (255, 0, 128)]
    assert picture.info["pixels"] == "black to white"
    assert picture.info["classes"] == "2 of 3"


def test_a_frame_marks_what_the_teacher_sees_otherwise(tmp_path: Path) -> None:
    picture = drawn(tmp_path / "set", torch.ones(2, 1, 8, 8), [1, 1], [1, 0])
    red = np.asarray(picture)[..., 0].astype(int) - np.asarray(picture)[..., 1] > 100
    assert not red[:, : LABEL + STEP].any()
    assert red[:, LABEL + STEP :].any()


def test_unbounded_values_are_shown_between_their_percentiles(tmp_path: Path) -> None:
    images = torch.linspace(-50, 50, 2 * 192).view(2, 3, 8, 8)
    picture = drawn(tmp_path / "set", images, [0, 1], [0, 1], bounded=False)
    assert picture.info["pixels"] == "1 % to 99 % of the values"
    assert max(centre(picture, 0, 0)) < 128 < min(centre(picture, 1, 0))


def test_large_sets_and_images_give_a_picture_of_bounded_size(tmp_path: Path) -> None:
    count = 2 * (CLASSES + 5)
    labels = [index // 2 for index in range(count)]
    picture = drawn(tmp_path / "set", torch.rand(count, 3, 100, 80), labels, labels, classes=CLASSES + 5)
    assert picture.size == (LABEL + IMAGES * STEP, CLASSES * STEP)
