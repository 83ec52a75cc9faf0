"""Procedural scenes: what refined images start from.

Natural images are objects that hide each other, at all sizes: flat or softly shaded areas, sharp and blurred edges,
textures whose power falls with frequency. The dead leaves model has these (Matheron 1968; Lee, Mumford & Huang 2001),
and networks learn useful filters from its images alone (Baradad et al. 2021). Here leaves are superellipses, which
range from stars over diamonds and ellipses to rectangles.
"""

import torch
from torch import Tensor

LEAVES = 120  # of an image, at most; an eighth of that at least
SMALLEST = (2.0, 10.0)  # bounds of the smallest radius in an image of side 32, in pixels; it grows as the side's root
LARGEST = 0.7  # radius, of the side
TAIL = 0.7  # radii are the smallest times u^−TAIL, u uniform
EXPONENTS = (0.7, 1.0, 2.0, 2.0, 10.0)  # of superellipses
SOFTNESS = (0.3, 0.5, 1.5, 4.0)  # widths of edges, pixels
TEXTURES = (0.0, 0.0, 0.06, 0.16)  # standard deviations of a leaf's texture, of the range of pixels
SHADES = 0.15  # standard deviation of the change of colour over a leaf's radius


def _pink(count: int, height: int, width: int, rng: torch.Generator) -> Tensor:
    """Return noise whose amplitude falls as 1/frequency, N×1×H×W, mean 0 and variance 1."""
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    frequency = (rows.square() + columns.square()).sqrt()
    frequency[0, 0] = 1.0
    shape = (count, 1, *frequency.shape)
    spectrum = torch.complex(torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)) / frequency
    noise: Tensor = torch.fft.irfft2(spectrum, (height, width))
    deviation, mean = torch.std_mean(noise, (2, 3), correction=0, keepdim=True)
    return (noise - mean) / deviation.clamp_min(1e-12)


def scenes(count: int, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """Draw scenes.

    Args:
        count: N.
        shape: C×H×W of one.
        rng: Of all draws, on the CPU.

    Returns:
        float32 N×C×H×W on the CPU, from 0, black, to 1, white.
    """
    channels, height, width = shape
    side = (height * width) ** 0.5
    y = torch.arange(height, dtype=torch.float32).view(1, 1, -1, 1)
    x = torch.arange(width, dtype=torch.float32).view(1, 1, 1, -1)

    def uniform(low: float, high: float, *extra: int) -> Tensor:
        return torch.rand(count, *(extra or (1,)), 1, 1, generator=rng) * (high - low) + low

    def chosen(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (count, 1, 1, 1), generator=rng)]

    base, spread, saturation = uniform(0, 1, channels), uniform(0.06, 0.36), uniform(0, 1).square()

    def colour() -> Tensor:
        varied = base * uniform(0.3, 1.4) + spread * torch.randn(count, channels, 1, 1, generator=rng)
        grey = varied.mean(1, keepdim=True)
        return grey + saturation * (varied - grey)

    texture = _pink(count, height, width, rng)
    smallest = uniform(*SMALLEST) * (side / 32) ** 0.5
    leaves = torch.randint(LEAVES // 8, LEAVES + 1, (count, 1, 1, 1), generator=rng)
    result = colour().expand(count, channels, height, width).clone()
    for leaf in range(LEAVES):
        radius = (smallest * uniform(1e-3, 1).pow(-TAIL)).clamp_max(LARGEST * side)
        angle, flatness = uniform(0, torch.pi), uniform(0.4, 1)
        across, down = x - uniform(-0.1, 1.1) * width, y - uniform(-0.1, 1.1) * height
        u = (across * angle.cos() + down * angle.sin()) / radius
        v = (down * angle.cos() - across * angle.sin()) / (radius * flatness)
        power = chosen(EXPONENTS)
        distance = (u.abs().pow(power) + v.abs().pow(power)).pow(1 / power) - 1
        mask = torch.sigmoid(-distance * radius / chosen(SOFTNESS)) * (leaf < leaves)
        shade = SHADES * torch.randn(count, 1, 1, 1, generator=rng) * u
        result = torch.lerp(result, colour() + chosen(TEXTURES) * texture + shade, mask)
    return result.clamp_(0, 1)
