import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from services.common.kernels import norms
from services.common.kernels.norms import Activation, fused, serves
from services.quantizer.kernels import eager
from tests.support.kernels import compile_or_skip

torch.set_num_threads(1)
ALONE, PLAIN, AFFINE = range(3)  # what is added


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    compile_or_skip(norms.library)


def tensor(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Channels last, of very different ranges, some of them constant."""
    rows = (1, shape[1], 1, 1)
    spread = torch.exp(torch.randn(rows, generator=rng)) * (torch.rand(rows, generator=rng) > 0.1)
    x = torch.randn(shape, generator=rng) * spread + torch.randn(rows, generator=rng)
    return x.contiguous(memory_format=torch.channels_last)


def norm(channels: int, rng: torch.Generator) -> nn.BatchNorm2d:
    """Frozen, with factors of both signs, some of them 0."""
    made = nn.BatchNorm2d(channels).eval()
    assert made.running_mean is not None
    assert made.running_var is not None
    made.running_mean.copy_(torch.randn(channels, generator=rng))
    made.running_var.copy_(torch.rand(channels, generator=rng) * 2 + 1e-3)
    made.weight.data.copy_(torch.randn(channels, generator=rng) * (torch.rand(channels, generator=rng) > 0.1))
    made.bias.data.copy_(torch.randn(channels, generator=rng))
    return made


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, bits: int) -> Tensor:
        return eager.fake_quantize(x, (2, 3), bits)[0]

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def plain(x: Tensor, layers: list[nn.BatchNorm2d], s: Tensor | None, activation: Activation) -> Tensor:
    z: Tensor = layers[0](x)
    if s is not None:
        z = z + (layers[1](s) if len(layers) > 1 else s)
    y = F.relu(z) if math.isinf(activation.cap) else F.relu6(z)
    result: Tensor = _Quantize.apply(y, activation.bits) if activation.bits else y
    return result


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9))


def case(
    shape: tuple[int, ...], seed: int, kind: int
) -> tuple[Tensor, list[nn.BatchNorm2d], Tensor | None, list[Tensor]]:
    """Return input, BatchNorm layers, shortcut, and all that gets a gradient."""
    rng = torch.Generator().manual_seed(seed)
    x = tensor(shape, rng).requires_grad_()
    s = tensor(shape, rng).requires_grad_() if kind != ALONE else None
    layers = [norm(shape[1], rng) for _ in range(2 if kind == AFFINE else 1)]
    return x, layers, s, [x, *([] if s is None else [s]), *(p for layer in layers for p in layer.parameters())]


def close(got: Tensor, want: Tensor, terms: Tensor | None = None) -> bool:
    """Whether gradients agree to 1e-5 of the largest; sums, of the size of what is summed."""
    scale = want.abs().max() if terms is None else terms
    return bool(((got - want).abs() <= 1e-5 * scale + 1e-12).all())


@settings(max_examples=80, deadline=None)
@given(
    SHAPES,
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 2, 4, 8]),
    st.sampled_from([math.inf, 6.0]),
    st.integers(0, 2),
)
@example((1, 1, 1, 1), 0, 4, math.inf, PLAIN)
@example((3, 40, 23, 29), 1, 4, math.inf, PLAIN)  # several parts
@example((3, 40, 23, 29), 2, 0, 6.0, AFFINE)
@example((2, 300, 9, 9), 3, 0, math.inf, PLAIN)
def test_equals_plain_pytorch(shape: tuple[int, ...], seed: int, bits: int, cap: float, kind: int) -> None:
    x, layers, s, leaves = case(shape, seed, kind)
    activation = Activation(cap, bits)
    assert serves(x, layers, s)
    (first, second), statistics = fused(x, layers, s, activation, 2)
    want = plain(x, layers, s, activation)
    assert torch.equal(first, want)
    assert torch.equal(second, want)
    assert first.stride() == x.stride()
    # Two readers, and the batch's statistics where there is no quantization.
    rng = torch.Generator().manual_seed(seed + 1)
    g, h = (torch.randn(shape, generator=rng) for _ in range(2))
    got_loss, want_loss = (first * g).sum() + (second * h).sum(), (want * (g + h)).sum()
    assert len(statistics) == (0 if bits else len(layers))
    for read, (mean, variance) in zip([t for t in (x, s) if t is not None], statistics, strict=False):
        exact_variance, exact_mean = torch.var_mean(read.double(), (0, 2, 3), correction=0)
        size = exact_variance.sqrt()
        assert ((mean - exact_mean).abs() <= 1e-5 * size + 1e-6 * exact_mean.abs()).all()
        assert ((variance - exact_variance).abs() <= 1e-5 * exact_variance + 1e-12 * exact_mean.square() + 1e-12).all()
        weights = torch.randn(2, shape[1], generator=rng)
        got_loss = got_loss + (weights[0] * mean + weights[1] * variance).sum()
        plain_variance, plain_mean = torch.var_mean(read, (0, 2, 3), correction=0)
        want_loss = want_loss + (weights[0] * plain_mean + weights[1] * plain_variance).sum()
    got, wanted = torch.autograd.grad(got_loss, leaves), torch.autograd.grad(want_loss, leaves)
    images = 1 if s is None else 2
    assert all(close(a, b) for a, b in zip(got[:images], wanted[:images], strict=True))
    for index, (a, b) in enumerate(zip(got[images:], wanted[images:], strict=True)):
        layer, source = layers[index // 2], (x, s)[index // 2]
        assert source is not None
        assert layer.running_mean is not None
        assert layer.running_var is not None
        terms = (g.abs() + h.abs()).detach()
        if index % 2 == 0:
            terms = terms * ((source.detach() - layer.running_mean.view(1, -1, 1, 1)).abs())
            terms = terms * (layer.running_var + layer.eps).rsqrt().view(1, -1, 1, 1)
        assert close(a, b, terms.sum((0, 2, 3)))


@pytest.mark.parametrize("bits", [0, 4])
def test_bfloat16_is_computed_in_float32_and_rounded_once(bits: int) -> None:
    x, layers, s, _ = case((3, 37, 7, 9), 0, PLAIN)
    assert s is not None
    narrow, shortcut = (t.detach().bfloat16().requires_grad_() for t in (x, s))
    activation = Activation(bits=bits)
    (y,), _ = fused(narrow, layers, shortcut, activation, 1)
    wide = [t.detach().float().requires_grad_() for t in (narrow, shortcut)]
    want = plain(wide[0], layers, wide[1], activation)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, want.bfloat16())
    g = torch.randn(y.shape).bfloat16()
    got = torch.autograd.grad(y, [narrow, shortcut, layers[0].weight], g)
    wanted = torch.autograd.grad(want, [*wide, layers[0].weight], g.float())
    assert torch.equal(got[1], wanted[1].bfloat16())
    assert torch.equal(got[0], wanted[0].bfloat16())
    assert got[2].dtype is torch.float32
    assert torch.allclose(got[2], wanted[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_or_passed_on(bad: float) -> None:
    x, layers, s, _ = case((2, 37, 5, 5), 0, PLAIN)
    layers[0].weight.data.fill_(1)
    x.data[1, 36, 4, 4] = bad
    with pytest.raises(ValueError, match="NaN, infinity"):
        fused(x, layers, s, Activation(bits=4), 1)
    (y,), _ = fused(x, layers, s, Activation(), 1)
    assert torch.equal(y.isnan(), plain(x, layers, s, Activation()).isnan())


@pytest.mark.parametrize("threads", [2, 3])
def test_results_do_not_depend_on_threads(threads: int) -> None:
    x, layers, s, leaves = case((5, 40, 30, 30), 0, AFFINE)

    def results() -> list[Tensor]:
        found = []
        for bits in (0, 4):
            (y,), statistics = fused(x, layers, s, Activation(bits=bits), 1)
            loss = y.square().sum() + sum((m.square() + v).sum() for m, v in statistics)
            found += [y, *torch.autograd.grad(loss, leaves)]
        return found

    alone = results()
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, results(), strict=True))
    finally:
        torch.set_num_threads(1)


def test_serves_only_what_the_kernels_know() -> None:
    x, layers, s, _ = case((2, 8, 4, 4), 0, PLAIN)
    assert s is not None
    assert not serves(x.contiguous(), layers, s)
    assert not serves(x, layers, s.contiguous())
    assert not serves(x.double(), layers, s.double())
    assert not serves(x, layers, s.bfloat16())
    assert not serves(x, layers, s[:, :, :1])
    assert not serves(x, [nn.BatchNorm2d(8)], s)
    assert not serves(x, [nn.BatchNorm2d(8, affine=False).eval()], s)
