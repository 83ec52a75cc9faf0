"""Refines drawn images by themselves: the last steps towards the teacher's statistics, which a generator does not take.

A generator is a small network, so its images keep a likeness to each other, and their statistics stay at a distance
from those of the BatchNorm layers. The pixels of a batch have no such bound. A few steps of Adam on corrections to them
bring the statistics near and make the teacher surer of the labels. (Optimizing images directly: DeepInversion, Yin et
al. 2020; ZeroQ, Cai et al. 2020.)

Corrections are a pyramid: a picture of full size, one of half the side, and so on, added up. Adam moves all values by
the same steps, so low frequencies, of which natural images have most, come as easily as high ones, and twenty steps do
what takes hundreds on pixels alone.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from services.generator.bn_statistics import BatchNormStatistics

RATE = 0.1  # of Adam at the first step, falling as half a cosine; in units of the logit of a pixel
BETAS = (0.9, 0.99)
LABEL_WEIGHT = 0.1  # of CE(T, y) beside the relative L_BNS
MARGIN = 0.02  # of the range of pixels, by which an image keeps away from black and white, where corrections vanish
LEAST_SIDE = 2  # of the pyramid's smallest picture


class _Pixels:
    """Corrections to images N×C×H×W, in the logit of their place between black and white, or in their own units."""

    def __init__(self, images: Tensor, pixel_range: tuple[Tensor, Tensor] | None) -> None:
        self._bounds = None
        self._start = images
        if pixel_range is not None:
            black, white = (end.to(images).view(1, -1, 1, 1) for end in pixel_range)
            self._bounds = black, white - black
            self._start = torch.logit(((images - black) / (white - black)).clamp(MARGIN, 1 - MARGIN))
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
        if self._bounds is not None:
            black, span = self._bounds
            total = black + span * torch.sigmoid(total)
        return total.contiguous(memory_format=torch.channels_last)


def refine(
    teacher: Callable[[Tensor], Tensor],
    statistics: BatchNormStatistics,
    images: Tensor,
    labels: Tensor,
    steps: int,
    pixel_range: tuple[Tensor, Tensor] | None,
    on_step: Callable[[], None],
) -> Tensor:
    """Return images moved by ``steps`` steps to where the teacher's statistics and labels are met better.

    Args:
        teacher: Frozen, images → logits N×K.
        statistics: Listens to the teacher.
        images: float32 N×C×H×W; statistics are met by the batch as a whole, so N should be 32 or more.
        labels: What the teacher is to see in them, int64 N.
        steps: 1 or more.
        pixel_range: What black and white are, C each; images stay between them. None leaves them unbounded.
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
