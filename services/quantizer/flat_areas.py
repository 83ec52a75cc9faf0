"""Flat areas: what real images have and synthetic ones lack.

Photographs and scans hold areas of one colour: a black border, a white page, a clear sky. There a layer gives the same
value at every position, and all of these positions are rounded in the same direction, so the error does not average
out as it does in a texture. A generator makes textures. A student that never saw a flat area is off in all of them.

So some of the training images are put on flat ground: a rectangle of the image stays, and the rest takes one colour
that a pixel can have. The teacher, run on the result, says what the student is to answer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.quantizer.batches import BatchSource
from services.quantizer.config import Training

SHARE = 0.5  # of the images, that get flat ground
BLACK, WHITE = 0.5, 0.25  # shares of the grounds; the others lie between the two
LEAST_SIDE = 0.25  # of the rectangle that stays, relative to the image's


@dataclass(frozen=True)
class FlatAreas:
    """Puts images on flat ground.

    Attributes:
        black: Value of a black pixel in the model's input, C.
        white: Value of a white pixel, C.
        seed: Of all draws.
    """

    black: Tensor
    white: Tensor
    seed: int = 0

    @classmethod
    def suiting(
        cls, training: Training, source: BatchSource, pixel_range: tuple[Tensor, Tensor] | None
    ) -> "FlatAreas | None":
        """Return those of a training, or None where it has none.

        They take a teacher to ask (feature distillation), images that no generator learns from, and known colours.
        """
        if not training.feature_weight or source.wants_gradients or pixel_range is None:
            return None
        return cls(*pixel_range, training.seed)

    def __call__(self, images: Tensor, number: int) -> Tensor:
        """Return a copy of images N×C×H×W with flat areas; the same ``number`` (≥ 0) draws the same ones."""
        rng = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        count, _, height, width = images.shape
        inside = self._extent(height, count, rng)[:, :, None] & self._extent(width, count, rng)[:, None, :]
        untouched = torch.rand(count, generator=rng) >= SHARE
        kind, level = torch.rand(count, generator=rng), torch.rand(count, generator=rng)
        level = torch.where(kind < BLACK, 0.0, torch.where(kind < BLACK + WHITE, 1.0, level))
        black, white = (colour.to(images).view(1, -1, 1, 1) for colour in (self.black, self.white))
        ground = black + (white - black) * level.to(images).view(-1, 1, 1, 1)
        kept = (inside | untouched[:, None, None]).unsqueeze(1).to(images.device)
        return torch.where(kept, images, ground)

    @staticmethod
    def _extent(size: int, count: int, rng: torch.Generator) -> Tensor:
        """Return ``count`` random intervals of a side as masks, count×size."""
        least = max(1, int(size * LEAST_SIDE))
        length = torch.randint(least, size + 1, (count,), generator=rng)
        begin = (torch.rand(count, generator=rng) * (size - length + 1)).long()
        places = torch.arange(size)
        return (places >= begin[:, None]) & (places < (begin + length)[:, None])
