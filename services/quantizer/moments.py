"""The moments of real activations, which BatchNorm layers remember.

Over the training data the output of a BatchNorm layer has the mean β and the standard deviation |γ| in each channel.
Synthetic images come near to these moments and no nearer: behind the last layers of a network they may spread two
thirds as far as real ones. A range that is read off them inherits that. So while ranges are set, every such output is
shifted and stretched to the moments that it is known to have. What is left to the images is the shape of the
distributions, skewed and bounded as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

MOST_STRETCH = 4.0  # of a channel: one that is all but silent on the images would be made of their noise
LEAST_SAMPLES = 32  # of a channel, images × positions, from which its moments are taken


class Moments(NamedTuple):
    """Mean and standard deviation of each channel, C."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def behind(cls, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> "Moments":
        """Return β and |γ|."""
        ones = torch.ones(norm.num_features)
        gamma = norm.weight.detach().abs() if norm.weight is not None else ones
        return cls(norm.bias.detach() if norm.bias is not None else torch.zeros_like(ones), gamma)

    def impose(self, x: Tensor) -> Tensor:
        """Return N×C×… with these moments over all but its channels; as it is where it has too few samples."""
        if x.numel() // x.shape[1] < LEAST_SAMPLES:
            return x
        dims = [d for d in range(x.dim()) if d != 1]
        deviation, mean = torch.std_mean(x, dims, correction=0, keepdim=True)
        wanted, target = (value.to(x).view_as(mean) for value in (self.deviation, self.mean))
        stretch = (wanted / deviation.clamp_min(torch.finfo(x.dtype).tiny)).clamp(1 / MOST_STRETCH, MOST_STRETCH)
        return (x - mean) * stretch + target
