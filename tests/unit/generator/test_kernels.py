import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from services.generator.kernels import batch_norm
from services.generator.kernels.batch_norm import normalized, serves
from services.generator.networks import LATENT, ConditionalGenerator
from tests.support.kernels import compile_or_skip

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    compile_or_skip(batch_norm.library)


def case(shape: tuple[int, ...], seed: int, by_sample: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return input, channels last and far from 0, scale, shift, and a gradient."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng) + 9 * torch.randn((1, shape[1], 1, 1), generator=rng)
    affine = [torch.randn(shape[:2] if by_sample else shape[1:2], generator=rng) for _ in range(2)]
    gradient = torch.randn(shape, generator=rng)
    x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x, gradient))
    return x.requires_grad_(), affine[0].requires_grad_(), affine[1].requires_grad_(), gradient


def exact(x: Tensor, norm: nn.BatchNorm2d, scale: Tensor, shift: Tensor, slope: float) -> Tensor:
    scale, shift = (t.double() if t.dim() == 2 else t.double().expand(x.shape[:2]) for t in (scale, shift))
    z = norm(x.double()) * scale[:, :, None, None] + shift[:, :, None, None]
    # Where z is 0 but for rounding, either side of the kink is right.
    assert z.abs().min() > 1e-5
    return F.leaky_relu(z, slope)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(2, 3), st.integers(1, 70), st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.sampled_from([0.2, 1.0]),
)
@example((4, 37, 17, 19), 0, True, 0.2)
def test_equals_batch_norm_in_double_precision(
    shape: tuple[int, ...], seed: int, by_sample: bool, slope: float
) -> None:
    x, scale, shift, gradient = case(shape, seed, by_sample)
    norm, other = nn.BatchNorm2d(shape[1], eps=0.8), nn.BatchNorm2d(shape[1], eps=0.8).double()
    assert serves(x)
    try:
        want = exact(x, other, scale, shift, slope)
    except AssertionError:
        return
    got = normalized(x, norm, scale, shift, slope)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max() + 1e-6
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(norm, name).double(), getattr(other, name).double(), rtol=1e-5, atol=1e-5)
    leaves = [x, scale, shift]
    wanted = torch.autograd.grad((want * gradient).sum(), leaves)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, gradient), wanted, strict=True):
        assert (mine - theirs).abs().max() <= 3e-5 * theirs.abs().max() + 1e-4


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    x, scale, shift, gradient = case((4, 37, 9, 9), 0, True)
    narrow = x.detach().bfloat16().requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    got, want = (normalized(t, nn.BatchNorm2d(37), scale, shift, 0.2) for t in (narrow, wide))
    assert torch.equal(got, want.bfloat16())
    gradient = gradient.bfloat16()
    one, other = torch.autograd.grad(got, narrow, gradient), torch.autograd.grad(want, wide, gradient.float())
    assert torch.equal(one[0], other[0].bfloat16())


@pytest.mark.parametrize("classes", [10, 300])
def test_a_generator_computes_the_same_without(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[Tensor, list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        generator = ConditionalGenerator((3, 16, 12), classes)
        images = generator(torch.randn(4, LATENT), torch.arange(4))
        gradients = torch.autograd.grad(images.cos().sum(), [*generator.parameters()])
        return images, list(gradients), list(generator.buffers())

    images, gradients, buffers = state()
    monkeypatch.setattr(batch_norm, "library", lambda: None)
    plain_images, plain_gradients, plain_buffers = state()
    assert torch.allclose(images, plain_images, atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(buffers, plain_buffers, strict=True))
    for a, b in zip(gradients, plain_gradients, strict=True):
        assert (a - b).abs().max() <= 1e-2 * b.abs().max() + 1e-3
