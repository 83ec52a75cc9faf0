import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from services.quantizer.codes import CodesMean
from services.quantizer.config import LayerBits
from services.quantizer.learned import ActivationQuantizer, CodeRange, QuantizedConv2d

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("bits", "signed", "lo", "hi"),
    [
        (2, False, 0, 3),
        (7, False, 0, 127),
        (8, False, 0, 127),
        (2, True, -1, 1),
        (7, True, -63, 63),
        (8, True, -128, 127),
    ],
)
def test_code_range(bits: int, signed: bool, lo: int, hi: int) -> None:
    assert CodeRange.of(bits, signed) == CodeRange(lo, hi)


@pytest.mark.parametrize(
    ("lo", "hi", "shift"), [(0, 127, 0), (-128, 127, 0), (-63, 63, 0), (0, 255, 128), (-127, 128, 1), (-200, 55, -72)]
)
def test_only_256_codes_are_shifted_and_then_are_signed_bytes(lo: int, hi: int, shift: int) -> None:
    found = CodeRange(lo, hi)
    assert found.shift == shift
    assert lo - found.shift >= -128
    assert hi - found.shift <= 127


def test_a_known_step_is_neither_calibrated_nor_learned() -> None:
    quantizer = ActivationQuantizer(2, CodeRange(0, 255), 8, step=torch.tensor([0.5, 2.0]))
    assert not quantizer.learns
    assert not list(quantizer.parameters())
    assert torch.allclose(quantizer.scale(), torch.tensor([0.5, 2.0]))
    assert "log_scale" in quantizer.state_dict()


def test_four_numbers_by_hand() -> None:
    quantizer = ActivationQuantizer(1, CodeRange(0, 3), 2)
    quantizer.log_scale.data.fill_(torch.tensor(0.5).log())
    x = torch.tensor([-1.0, 0.25, 0.8, 9.0]).view(1, 1, 2, 2)
    assert quantizer(x).flatten().tolist() == [0.0, 0.0, 2.0, 3.0]  # 0.25/0.5 is a tie and goes to the even code


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([CodeRange(0, 7), CodeRange(-8, 7), CodeRange(-128, 127)]))
def test_gradients_are_those_of_lsq(seed: int, code_range: CodeRange) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 5, 5, generator=rng, dtype=torch.float64) * 4
    scale = torch.rand(4, generator=rng, dtype=torch.float64) + 0.1
    upstream = torch.randn(3, 4, 5, 5, generator=rng, dtype=torch.float64)  # dL/d(codes·s)
    quantizer = ActivationQuantizer(4, code_range, 4).double()
    quantizer.log_scale.data.copy_(scale.log())
    x.requires_grad_()
    s = scale.view(1, 4, 1, 1)
    (quantizer(x) * s * upstream).sum().backward()  # a reader multiplies by s without passing a gradient to it
    v = x.detach() / s
    inside = (v >= code_range.lo) & (v <= code_range.hi)
    assert x.grad is not None
    assert torch.allclose(x.grad, upstream * inside)
    per_value = torch.where(inside, v.round() - v, v.clamp(code_range.lo, code_range.hi))
    want = (upstream * per_value).sum((0, 2, 3)) * scale  # by the logarithm: times s
    assert quantizer.log_scale.grad is not None
    assert torch.allclose(quantizer.log_scale.grad, want)


def test_ceiling_bounds_the_scale_whatever_training_does() -> None:
    quantizer = ActivationQuantizer(2, CodeRange(0, 15), 4, ceiling=6.0)
    quantizer.log_scale.data.fill_(5.0)
    assert torch.allclose(quantizer.scale(), torch.full((2,), 6 / 15))
    assert float(quantizer(torch.full((1, 2, 1, 1), 7.0)).detach().max()) == 15


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolution_of_codes_equals_convolution_of_values(groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 12, 3, padding=1, groups=groups)
    quantizer = ActivationQuantizer(6, CodeRange.of(8, signed=True), 8)
    quantizer.log_scale.data.uniform_(-4, -3)
    layer = QuantizedConv2d(conv, quantizer, LayerBits(8, 8))
    step = layer.folded_weight().detach().flatten(1).abs().amax(1) / layer.grid.limit
    layer.log_step.data.copy_(step.log())
    x = torch.randn(2, 6, 7, 7)
    codes = quantizer(x)
    want = conv(codes * quantizer.scale().view(1, -1, 1, 1))
    assert (layer(codes) - want).abs().max() < 0.02 * want.abs().max()
    weights = layer.weight_codes().detach()
    assert torch.equal(weights, weights.round())
    assert weights.abs().max() == layer.grid.limit


def test_mean_of_codes_is_the_mean() -> None:
    quantizer = ActivationQuantizer(3, CodeRange(0, 127), 8)
    quantizer.log_scale.data.uniform_(-4, -3)
    codes = torch.randint(0, 128, (2, 3, 5, 4)).float()
    want = (codes * quantizer.scale().view(1, -1, 1, 1)).mean((2, 3), keepdim=True)
    assert torch.allclose(CodesMean(quantizer)(codes), want, rtol=1e-6)
