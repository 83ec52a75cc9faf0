"""The conditional generator: noise and labels in, images out (GDFQ, AdaDFQ and GranQ use the same small network)."""

import math
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F

from services.generator.kernels.batch_norm import normalized, serves

LATENT: Final = 100
# With more, the product of embedding and noise says too little about the class, and BatchNorm is conditional instead.
MAX_EMBEDDED_CLASSES: Final = 200
# The published networks pass 0.8 as BatchNorm's second argument, which is its epsilon.
_EPSILON: Final = 0.8
_SLOPE: Final = 0.2  # of the leaky ReLU behind all but the first


class ConditionalBatchNorm2d(nn.Module):
    """BatchNorm2d whose scale and shift are those of each sample's class, and leaky ReLU, N×C×H×W → N×C×H×W."""

    def __init__(self, channels: int, num_classes: int, eps: float, slope: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.scale = nn.Embedding(num_classes, channels)
        self.shift = nn.Embedding(num_classes, channels)
        self.slope = slope
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Normalize over the batch, then scale and shift by class."""
        scale, shift = self.scale(labels), self.shift(labels)
        if self.norm.training and serves(x):
            return normalized(x, self.norm, scale, shift, self.slope)
        scale, shift = (of[:, :, None, None].to(x.dtype) for of in (scale, shift))
        return F.leaky_relu(self.norm(x) * scale + shift, self.slope)


class _PlainBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with leaky ReLU."""

    def __init__(self, channels: int, eps: float, slope: float) -> None:
        super().__init__(channels, eps=eps)
        self.slope = slope

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize; the labels say nothing here."""
        if self.training and serves(input):
            return normalized(input, self, self.weight, self.bias, self.slope)
        return F.leaky_relu(super().forward(input), self.slope)


class UpsampledConv2d(nn.Conv2d):
    """A 3×3 convolution of the image enlarged by nearest neighbours, N×I×h×w → N×O×H×W.

    Enlarging to exactly twice the size is a transposed convolution with a 2×2 kernel of ones, so both together are one
    transposed convolution with a 4×4 kernel. That takes 16 multiply-adds for each input pixel and pair of channels
    instead of 36, and half the time of the generator, which is most of the time of a synthesis.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the convolution of the input enlarged to a size; the default is twice its own."""
        doubled = (2 * input.shape[2], 2 * input.shape[3])
        if size is not None and size != doubled:
            return super().forward(F.interpolate(input, size=size))
        # Each slice is convolved with the 2×2 ones, an axis at a time.
        rows = self.weight.transpose(0, 1).flip(2, 3)
        rows = F.pad(rows, (0, 0, 0, 1)) + F.pad(rows, (0, 0, 1, 0))
        kernel = F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))
        # As the convolution wants it, which would make a copy of its own for each of its three uses.
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(input, kernel, self.bias, stride=2, padding=1)


class Pixels(nn.Module):
    """Maps −1 to black and 1 to white, N×C×H×W; both are float32 C."""

    centre: torch.Tensor
    amplitude: torch.Tensor

    def __init__(self, black: torch.Tensor, white: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", ((black + white) / 2).view(1, -1, 1, 1))
        self.register_buffer("amplitude", ((white - black) / 2).view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the images."""
        return self.centre + self.amplitude * x


class ConditionalGenerator(nn.Module):
    """z (N×100), y (N) → images N×C×H×W.

    Without ``pixel_range`` each channel has mean 0 and variance 1 over the batch, as published. With it, images reach
    from black to white and no further: real images are full of areas that are exactly black or white, in which every
    neighbour has the same rounding error, and a student that never saw such areas drifts in them. The mean and variance
    of the images then follow from the statistics of the first BatchNorm.

    For H and W that are multiples of 4 the feature maps are (H/4)×(W/4), (H/2)×(W/2) and H×W, as published; for other
    sizes the first two are rounded up. Runs in training mode always: BatchNorm uses the batch at hand.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        pixel_range: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        self._sizes = [(math.ceil(height / d), math.ceil(width / d)) for d in (4, 2, 1)]
        self.conditional = num_classes > MAX_EMBEDDED_CLASSES

        def norm(features: int, eps: float, slope: float) -> nn.Module:
            if self.conditional:
                return ConditionalBatchNorm2d(features, num_classes, eps, slope)
            return _PlainBatchNorm2d(features, eps, slope)

        self.embedding = None if self.conditional else nn.Embedding(num_classes, LATENT)
        self.project = nn.Linear(LATENT, 128 * self._sizes[0][0] * self._sizes[0][1])
        self.norm0 = norm(128, 1e-5, 1.0)
        self.conv1 = UpsampledConv2d(128, 128)
        self.norm1 = norm(128, _EPSILON, _SLOPE)
        self.conv2 = UpsampledConv2d(128, 64)
        self.norm2 = norm(64, _EPSILON, _SLOPE)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.output: nn.Module = nn.BatchNorm2d(channels, affine=False) if pixel_range is None else Pixels(*pixel_range)

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the images."""
        if self.embedding is not None:
            z = z * self.embedding(labels)
        x = self.project(z).view(z.shape[0], 128, *self._sizes[0])
        # What convolutions are fastest in; all that follows keeps it, the teacher and the student too.
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv1(self.norm0(x, labels), self._sizes[1])
        x = self.conv2(self.norm1(x, labels), self._sizes[2])
        x = self.norm2(x, labels)
        # Whatever the layers compute in, images are float32.
        images: torch.Tensor = self.output(torch.tanh(self.conv3(x).float()))
        return images
