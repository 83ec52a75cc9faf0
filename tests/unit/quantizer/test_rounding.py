from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from services.quantizer import rounding
from services.quantizer.config import LayerBits
from services.quantizer.grids import WeightGrid
from services.quantizer.learned import ActivationQuantizer, CodeRange, QuantizedConv2d, QuantizedLinear
from services.quantizer.rounding import DAMPING, compensated_codes, covariance, improved_codes, settle_weights

torch.set_num_threads(1)


def quantizer(channels: int) -> ActivationQuantizer:
    made = ActivationQuantizer(channels, CodeRange(0, 15), 4)
    made.log_scale.data.copy_(torch.linspace(-2.0, -0.5, channels))
    return made


def ranged(layer: QuantizedConv2d) -> QuantizedConv2d:
    layer.log_step.data.copy_((layer.folded_weight().detach().flatten(1).abs().amax(1) / layer.grid.limit).log())
    return layer


def alike(channels: int, size: int = 10, count: int = 12) -> Tensor:
    """Codes whose channels and neighbours are alike, as those of real layers."""
    rng = torch.Generator().manual_seed(channels)
    coarse = torch.rand(count, 2, size // 2, size // 2, generator=rng)
    mixed = torch.einsum("cd,ndhw->nchw", torch.rand(channels, 2, generator=rng), coarse)
    smooth = nn.functional.interpolate(mixed, size=(size, size), mode="bilinear")
    return (smooth * 10 + torch.rand(count, channels, size, size, generator=rng)).round().clamp(0, 15)


LAYERS: dict[str, tuple[Callable[[], QuantizedConv2d], int]] = {
    "convolution": (lambda: QuantizedConv2d(nn.Conv2d(6, 8, 3, padding=1), quantizer(6), LayerBits(3, 4)), 6),
    "two bits": (lambda: QuantizedConv2d(nn.Conv2d(6, 8, 3, padding=1), quantizer(6), LayerBits(2, 4)), 6),
    "strided": (lambda: QuantizedConv2d(nn.Conv2d(6, 8, 3, stride=2, padding=1), quantizer(6), LayerBits(3, 4)), 6),
    "pointwise": (lambda: QuantizedConv2d(nn.Conv2d(12, 8, 1), quantizer(12), LayerBits(3, 4)), 12),
    "depthwise": (lambda: QuantizedConv2d(nn.Conv2d(6, 6, 3, groups=6), quantizer(6), LayerBits(3, 4)), 6),
    "grouped": (lambda: QuantizedConv2d(nn.Conv2d(8, 12, 3, groups=2), quantizer(8), LayerBits(3, 4)), 8),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layers_output_errs_less_and_its_weights_round_to_what_was_chosen(kind: str) -> None:
    torch.manual_seed(3)
    make, channels = LAYERS[kind]
    layer = ranged(make())
    codes = alike(channels)
    weight = layer.folded_weight().detach().clone()
    bias = torch.zeros_like(layer.bias)

    def noise(rounded: Tensor) -> float:
        with torch.no_grad():
            layer.quantized_weight_and_bias = lambda: (rounded - weight, bias)  # type: ignore[method-assign]
            output = layer(codes)
        del layer.quantized_weight_and_bias
        return float((output - output.mean((0, 2, 3), keepdim=True)).square().mean())

    step = layer.log_step.detach().exp().view(-1, 1, 1, 1)
    before = noise(layer.weight_codes().detach() * step)
    settle_weights(layer, codes)
    after = noise(layer.weight_codes().detach() * step)
    assert after < 0.8 * before
    assert float(layer.weight_codes().detach().abs().max()) <= layer.grid.limit


def test_the_covariance_is_that_of_what_the_weights_multiply() -> None:
    layer = QuantizedLinear(nn.Linear(5, 3), quantizer(5), LayerBits(4, 4))
    codes = torch.randint(0, 16, (40, 5), generator=torch.Generator().manual_seed(0)).float()
    found, samples = covariance(layer, codes)
    assert samples == 40
    assert torch.allclose(found[0], torch.cov(codes.double().t(), correction=0))
    convolution = LAYERS["grouped"][0]()
    codes = alike(8)
    found, samples = covariance(convolution, codes)
    patches = nn.functional.unfold(codes, 3).permute(1, 0, 2).reshape(2, 36, -1).double()
    assert samples == patches.shape[2]
    for group in range(2):
        assert torch.allclose(found[group], torch.cov(patches[group], correction=0), atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.integers(2, 8))
def test_codes_are_in_range_and_those_of_independent_inputs_are_the_nearest(
    seed: int, width: int, outputs: int, groups: int, bits: int
) -> None:
    grid, rng = WeightGrid.of(bits), torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, outputs, width, generator=rng) * grid.limit / 2
    independent = torch.diag_embed(torch.rand(groups, width, generator=rng, dtype=torch.float64) + 0.1)
    assert torch.equal(compensated_codes(weight, independent, grid), grid.nearest(weight))
    samples = torch.randn(groups, width, 2 * width, generator=rng, dtype=torch.float64)
    codes = compensated_codes(weight, samples @ samples.transpose(1, 2), grid)
    assert torch.equal(codes, grid.nearest(codes))


def error(weight: Tensor, codes: Tensor, seen: Tensor) -> Tensor:
    """Of each output, G×O."""
    off = (weight - codes).double()
    return (off @ seen * off).sum(2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 150), st.integers(1, 5), st.integers(1, 3), st.integers(2, 8))
def test_no_single_code_of_an_improved_rounding_can_move_for_the_better(
    seed: int, width: int, outputs: int, groups: int, bits: int
) -> None:
    grid, rng = WeightGrid.of(bits), torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, outputs, width, generator=rng) * grid.limit / 2
    samples = torch.randn(groups, width, 2 * width, generator=rng, dtype=torch.float64) + 1
    seen = samples @ samples.transpose(1, 2) / width
    begin = compensated_codes(weight, seen, grid)
    codes = improved_codes(weight, begin, seen, grid, 1000)
    assert torch.equal(codes, grid.nearest(codes))
    least = error(weight, codes, seen)
    assert bool((least <= error(weight, begin, seen) * (1 + 1e-6)).all())
    for column in range(width):
        for step in (-grid.spacing, grid.spacing):
            other = codes.clone()
            other[:, :, column] = (other[:, :, column] + step).clamp(-grid.limit, grid.limit)
            assert bool((error(weight, other, seen) >= least * (1 - 1e-4) - 1e-4).all())


def test_codes_that_were_rounded_too_early_are_found() -> None:
    # Of two inputs that are nearly the same, only the sum of the codes counts.
    seen = torch.tensor([[[1.0, 0.999], [0.999, 1.0]]], dtype=torch.float64)
    weight, bad = torch.tensor([[[2.4, 2.4]]]), torch.tensor([[[5.0, 5.0]]])
    codes = improved_codes(weight, bad, seen, WeightGrid.of(4))
    assert float(codes.sum()) == 5.0
    assert float(error(weight, codes, seen)) < 0.1 < float(error(weight, torch.full_like(bad, 2.0), seen))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_step_of_each_output_is_the_one_with_which_it_errs_least(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The choice is made before codes are looked at again.
    monkeypatch.setattr(rounding, "improved_codes", lambda weight, codes, seen, grid: codes)
    make, channels = LAYERS[kind]
    codes, clips = alike(channels), (1.0, 0.8, 0.6, 0.4)
    noises = []
    for tried in ((1.0,), *((clip,) for clip in clips[1:]), clips):
        torch.manual_seed(3)
        layer = ranged(make())
        weight, largest = layer.folded_weight().detach(), layer.log_step.detach().exp()
        settle_weights(layer, codes, tried)
        step = layer.log_step.detach().exp()
        assert bool(torch.isclose(step[:, None] / largest[:, None], torch.tensor(tried), rtol=1e-5).any(1).all())
        errors = layer.weight_codes().detach() * step.view(-1, 1, 1, 1) - weight
        seen, samples = covariance(layer, codes)
        groups, width, _ = seen.shape
        # As the rounding sees it: with little trust in what few samples tell of the covariance.
        level = seen.diagonal(dim1=1, dim2=2).mean(1) * (DAMPING + width / samples)
        seen += torch.diag_embed(level[:, None].expand(groups, width))
        flat = errors.flatten(1).view(groups, -1, width).double()
        noises.append((flat @ seen * flat).sum(2).flatten())
    *alone, together = noises
    assert torch.allclose(together, torch.stack(alone).amin(0), rtol=1e-3)
