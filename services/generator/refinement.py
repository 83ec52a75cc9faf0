"""Refines the pixels of scenes until they mean to the teacher what its training images did.

A generator is a small network: its images are textures with a likeness to each other, and their statistics stay at a
distance from those of the BatchNorm layers. Scenes (``scenes.py``) have flat areas, edges and objects, and pixels have
no bound that a network would set. A few steps of Adam on corrections to them bring the statistics near and make the
teacher sure of the labels. Students learn more from both kinds than from as many of one. (Optimizing images directly:
DeepInversion, Yin et al. 2020; ZeroQ, Cai et al. 2020.)

Corrections are a pyramid: a picture of full size, one of half the side, and so on, added up. Adam moves all values by
the same steps, so low frequencies, of which natural images have most, come as easily as high ones.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from services.generator.bn_statistics import BatchNormStatistics

RATE = 0.1  # of Adam at the first step, falling as half a cosine; in units of the logit of a pixel
BETAS = (0.9, 0.99)
LABEL_WEIGHT = 0.1  # of CE(T, y) beside the relative L_BNS
MARGIN = 0.02  # of the range of pixels, by which an image keeps away from black and white, where corrections vanish
UNKNOWN_REACH = 2.0  # of a model's input whose black and white are not known: it is standardized by custom
LEAST_SIDE = 2  # of the pyramid's smallest picture


class _Pixels:
    """Corrections to scenes N×C×H×W, in the logit of their place between black and white."""

    def __init__(self, images: Tensor, pixel_range: tuple[Tensor, Tensor] | None) -> None:
        self._bounds: tuple[Any, Any] = -UNKNOWN_REACH, 2 * UNKNOWN_REACH
        if pixel_range is not None:
            black, white = (end.to(images).view(1, -1, 1, 1) for end in pixel_range)
            self._bounds = black, white - black
        self._start = torch.logit(images.clamp(MARGIN, 1 - MARGIN))
        self._size = images.shape[2:]
        height, width = self._size
        self.pyramid: list[Tensor] = []
        while min(height, width) >= LEAST_SIDE or not self.pyramid:
            self.pyramid.append(images.new_zeros(*images.shape[:2], height, width, requires_grad=True))
            height, width = height // 2, width // 2

    def images(self) -> Tensor:
        """Return the corrected images."""
        total = self._start + self.pyramid[0]
        for part in self.pyramid[1:]:
            total = total + F.interpolate(part, size=self._size, mode="bilinear")
        black, span = self._bounds
        result: Tensor = black + span * torch.sigmoid(total)
        return result.contiguous(memory_format=torch.channels_last)


def refine(
    teacher: Callable[[Tensor], Tensor],
    statistics: BatchNormStatistics,
    images: Tensor,
    labels: Tensor,
    steps: int,
    pixel_range: tuple[Tensor, Tensor] | None,
    on_step: Callable[[], None],
) -> Tensor:
    """Return scenes as the model's input, moved by ``steps`` steps to meet the statistics and the labels better.

    Args:
        teacher: Frozen, images → logits N×K.
        statistics: Listens to the teacher.
        images: Scenes, float32 N×C×H×W from 0 to 1; statistics are met by all together, so N should be 32 or more.
        labels: What the teacher is to see in them, int64 N.
        steps: 0 or more.
        pixel_range: What black and white are, C each, between which images stay; None where nothing is known.
        on_step: Called before each step.
    """
    pixels = _Pixels(images, pixel_range)
    optimizer = torch.optim.Adam(pixels.pyramid, lr=RATE, betas=BETAS)
    for step in range(steps):
        on_step()
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.enable_grad():
            logits = teacher(pixels.images())
            loss = statistics.take_loss(relative=True) + LABEL_WEIGHT * F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return pixels.images()
