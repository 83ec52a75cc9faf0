"""Grids of weight codes, and what training sees of the one without zero."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from services.quantizer.calibrate import calibrate
from services.quantizer.config import LayerBits
from services.quantizer.grids import WeightGrid, odd_codes
from services.quantizer.integer_modules import IntegerLinear
from services.quantizer.learned import ActivationQuantizer, CodeRange, QuantizedLinear

torch.set_num_threads(1)


def codes_of(grid: WeightGrid) -> list[int]:
    return list(range(-grid.limit, grid.limit + 1, grid.spacing))


def test_codes_of_every_width() -> None:
    assert codes_of(WeightGrid.of(2)) == [-3, -1, 1, 3]
    assert codes_of(WeightGrid.of(3)) == [-7, -5, -3, -1, 1, 3, 5, 7]
    assert [WeightGrid.of(bits).limit for bits in range(4, 9)] == [7, 15, 31, 63, 127]


@given(st.integers(2, 8), st.floats(-300, 300))
def test_the_nearest_code_is_nearest(bits: int, x: float) -> None:
    grid = WeightGrid.of(bits)
    found = float(grid.nearest(torch.tensor(x, dtype=torch.float64)))
    assert found in codes_of(grid)
    assert abs(found - x) == min(abs(code - x) for code in codes_of(grid))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_gradients_are_those_of_lsq(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, 2, 2, generator=rng, dtype=torch.float64) * 2
    step = (torch.rand(4, 1, 1, 1, generator=rng, dtype=torch.float64) + 0.3).log().requires_grad_()
    upstream = torch.randn(4, 3, 2, 2, generator=rng, dtype=torch.float64)  # dL/d(codes·t)
    weight.requires_grad_()
    t = step.detach().exp()
    (odd_codes(weight, step, 3) * t * upstream).sum().backward()
    v = weight.detach() / t
    inside = v.abs() <= 3
    nearest = torch.where(v < 0, -1.0, 1.0) * torch.where(v.abs() < 2, 1.0, 3.0)
    assert torch.equal(odd_codes(weight, step, 3).detach(), nearest)
    assert weight.grad is not None
    assert torch.allclose(weight.grad, upstream * inside)
    want = upstream * torch.where(inside, nearest - v, nearest) * t  # by the logarithm: times t
    assert step.grad is not None
    assert torch.allclose(step.grad, want.sum((1, 2, 3), keepdim=True))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integers_are_what_the_student_computes(bits: int) -> None:
    torch.manual_seed(bits)
    quantizer = ActivationQuantizer(6, CodeRange(0, 127), 8)
    quantizer.log_scale.data.uniform_(-2, -1)
    layer = QuantizedLinear(nn.Linear(6, 4), quantizer, LayerBits(bits, 8))
    layer.log_step.data.uniform_(-4, -3)
    codes = torch.randint(0, 128, (5, 6), generator=torch.Generator().manual_seed(0)).float()
    integers = IntegerLinear(layer)
    assert set(integers.codes.flatten().tolist()) <= set(codes_of(layer.grid))
    # ±(2^b − 1)·127 for each of six inputs, and the bias.
    bound = 6 * layer.grid.limit * 127 + int(integers.bias.abs().max())
    assert integers.accumulator_bound <= bound
    assert torch.allclose(layer(codes), integers(codes), atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_row_without_weights_gives_nothing(bits: int) -> None:
    torch.manual_seed(bits)
    quantizer = ActivationQuantizer(6, CodeRange(0, 127), 8)
    linear = nn.Linear(6, 4)
    with torch.no_grad():
        linear.weight[1] = linear.bias[1] = 0
    student = nn.Sequential(quantizer, QuantizedLinear(linear, quantizer, LayerBits(bits, 8)))
    images = torch.rand(16, 6)
    calibrate(student, images)
    with torch.no_grad():
        found = student(images)
    assert float(found[:, 1].abs().max()) < 0.01 * float(found.abs().max())
