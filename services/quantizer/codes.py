"""What reads an activation's codes and is no layer: rearrangements, poolings, and the way back to float values."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from services.quantizer.learned import ActivationQuantizer, CodeRange, CodeSource


class Rearranged:
    """Codes of several quantizers in a new order of channels, such as a concatenation or a channel shuffle.

    Integers are concatenated and moved as they are, so nothing is rounded a second time, and each channel keeps the
    scale of the tensor that it comes from.

    Args:
        parts: Quantizers of one code range and one number of bits.
        order: For each channel, which one it is among the channels of all parts, counted in their order.
    """

    def __init__(self, parts: Sequence[ActivationQuantizer], order: Tensor) -> None:
        self.parts = tuple(parts)
        self.order = order

    @property
    def code_range(self) -> CodeRange:
        """Codes that may occur."""
        return self.parts[0].code_range

    @property
    def bits(self) -> int:
        """Width of the codes."""
        return self.parts[0].bits

    def scale(self) -> Tensor:
        """Return s, C, in the new order, without a gradient."""
        return self.gather(ActivationQuantizer.scale)

    def gather(self, values: Callable[[ActivationQuantizer], Tensor]) -> Tensor:
        """Return the value of each channel, C, in the new order."""
        found = torch.cat([values(part) for part in self.parts])
        return found[self.order.to(found.device)]


class _Reader(nn.Module):
    """Reads codes and knows their scales."""

    def __init__(self, quantizer: CodeSource) -> None:
        super().__init__()
        # A plain reference: the quantizer's parameters belong to its own place in the graph.
        self._quantizer = (quantizer,)

    @property
    def quantizer(self) -> CodeSource:
        """Where the codes that come in are made."""
        return self._quantizer[0]


class Dequantize(_Reader):
    """Codes → float values, for readers that are no quantized layer (a residual add, a multiplication)."""

    def forward(self, codes: Tensor) -> Tensor:
        """Return codes·s."""
        return codes * self.quantizer.scale().view(1, -1, *[1] * (codes.dim() - 2))


class CodesMean(_Reader):
    """Global average pooling of codes N×C×H×W → float N×C×1×1.

    Integer codes are added first and scaled once. The sum is exact in float32 below 2^24, so that its order does not
    matter and every runtime returns the same bits; a mean of scaled floats would not.
    """

    def forward(self, codes: Tensor) -> Tensor:
        """Return the mean over H×W of codes·s."""
        factor = self.quantizer.scale() / (codes.shape[2] * codes.shape[3])
        return codes.sum((2, 3), keepdim=True) * factor.view(1, -1, 1, 1)


class CodesPool(_Reader):
    """Average pooling of codes over windows, N×C×H×W → float N×C×H'×W', scaled behind the pooling.

    As in ``CodesMean`` the windows' sums are exact. One correctly rounded division by the window's size follows.

    Args:
        quantizer: Where the codes are made.
        pool: The pooling.
    """

    def __init__(self, quantizer: CodeSource, pool: nn.Module) -> None:
        super().__init__(quantizer)
        self.pool = pool

    def forward(self, codes: Tensor) -> Tensor:
        """Return the windows' means of codes·s."""
        pooled: Tensor = self.pool(codes)
        return pooled * self.quantizer.scale().view(1, -1, 1, 1)
