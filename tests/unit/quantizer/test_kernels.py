from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import hatch_build
from services.quantizer import kernels
from services.quantizer.config import ActivationGranularity, WeightGranularity
from services.quantizer.fake_quant import activation_dims, fake_quantize, weight_dims
from services.quantizer.kernels import cpu, eager

torch.set_num_threads(1)
ROOT = Path(hatch_build.__file__).parent
ACTIVATION = [activation_dims(4, granularity) for granularity in ActivationGranularity]
WEIGHT = [weight_dims(4, granularity) for granularity in WeightGranularity]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    if not hatch_build.compile_kernels(ROOT):
        pytest.skip("no C++ compiler: the CPU kernels are left out")
    cpu.library.cache_clear()
    assert cpu.library() is not None


def tensor(shape: tuple[int, ...], seed: int, channels_last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of very different ranges and offsets from channel to channel, some of them constant."""
    rng = torch.Generator().manual_seed(seed)
    rows = (*shape[:2], *[1] * (len(shape) - 2))
    spread = torch.exp(torch.randn(rows, generator=rng)) * (torch.rand(rows, generator=rng) > 0.1)
    x = (torch.randn(shape, generator=rng) * spread + torch.randn(rows, generator=rng)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1), st.integers(2, 8), st.sampled_from(ACTIVATION + WEIGHT), st.booleans())
@example((1, 1, 1, 1), 0, 2, (2, 3), False)
@example((2, 3, 300, 300), 1, 4, (0, 1, 2, 3), False)  # a group that is taken in chunks
@example((16, 64, 32, 32), 2, 5, (2, 3), True)
@example((3, 133, 8, 8), 3, 4, (2, 3), False)  # rows that are taken together, and fewer
@example((2, 141, 8, 8), 4, 4, (2, 3), True)  # more columns than are taken at once
def test_fake_quantization_equals_plain_pytorch(
    shape: tuple[int, ...], seed: int, bits: int, dims: tuple[int, ...], channels_last: bool
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = tensor(shape, seed, channels_last, dtype)
        want, finite = eager.fake_quantize(x, dims, bits)
        got = cpu.fake_quantize(x, dims, bits)
        if got is None:
            # Channels over all samples do not lie together in memory.
            assert dims == (0, 2, 3)
            continue
        assert finite
        assert got[1]
        assert torch.equal(got[0], want)
        assert got[0].stride() == x.stride()


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1), st.sampled_from([(0, 3), (0, 127), (-7, 7), (-128, 127)]), st.booleans())
@example((4, 20, 40, 40), 0, (0, 15), False)
@example((4, 20, 40, 40), 0, (0, 15), True)
def test_codes_and_their_gradients_equal_plain_pytorch(
    shape: tuple[int, ...], seed: int, codes: tuple[int, int], channels_last: bool
) -> None:
    x = tensor(shape, seed, channels_last)
    rng = torch.Generator().manual_seed(seed)
    grad = torch.randn(shape, generator=rng)
    for scales in ((1, shape[1], 1, 1), (shape[0], 1, 1, 1)):  # of an activation, of a weight
        inverse = torch.rand(scales, generator=rng) * 9 + 0.1
        got = cpu.codes(x, inverse, *codes)
        gradients = cpu.codes_backward(grad, x, inverse, *codes)
        assert got is not None
        assert gradients is not None
        assert torch.equal(got, eager.codes(x, inverse, *codes))
        assert torch.equal(gradients[0], eager.codes_backward(grad, x, inverse, *codes)[0])
        # Sums differ in order: both are held to the exact ones, by the size of what is summed.
        terms = eager.codes_backward(grad.double(), x.double(), inverse.double().expand(shape), *codes)[1]
        error = (gradients[1].double() - terms.sum_to_size(scales)).abs()
        flips = 1e-6 * terms.abs().sum_to_size(scales) + 1e-6
        same = eager.codes_backward(grad, x, inverse.expand(shape), *codes)[1].double()
        assert (error <= flips + (same - terms).abs().sum_to_size(scales)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dims", [(2, 3), (0, 1, 2, 3)])
def test_what_is_not_finite_is_found_wherever_it_lies(bad: float, channels_last: bool, dims: tuple[int, ...]) -> None:
    for place in ((0, 0, 0, 0), (1, 20, 4, 3), (1, 70, 8, 8), (1, 100, 8, 8)):
        x = tensor((2, 101, 9, 9), 0, channels_last)
        x[place] = bad
        found = cpu.fake_quantize(x, dims, 4)
        assert found is not None
        assert not found[1]
        with pytest.raises(ValueError, match="NaN, infinity"):
            kernels.fake_quantize(x, dims, 4)


def test_codes_of_nan_are_nan() -> None:
    x = tensor((1, 40, 3, 3), 0, False)
    x[0, 3, 1, 1] = x[0, 39, 2, 2] = float("nan")
    got = cpu.codes(x, torch.ones(1, 40, 1, 1), -7, 7)
    assert got is not None
    assert torch.equal(got.isnan(), x.isnan())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_threads(threads: int) -> None:
    x, grad = tensor((8, 40, 20, 20), 0, True), tensor((8, 40, 20, 20), 1, True)
    inverse = torch.rand(1, 40, 1, 1, generator=torch.Generator().manual_seed(0)) + 0.1

    def results() -> list[Tensor]:
        return [
            *(kernels.fake_quantize(x, dims, 4) for dims in ((2, 3), (0, 1, 2, 3))),
            kernels.codes(x, inverse, 0, 7),
            *kernels.codes_backward(grad, x, inverse, 0, 7),
        ]

    alone = results()
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, results(), strict=True))
    finally:
        torch.set_num_threads(1)


def _strided() -> Tensor:
    return tensor((4, 6, 7, 14), 0, False)[:, ::2, :, ::2]


@pytest.mark.parametrize("of", [lambda x: x.double(), lambda x: x, lambda x: x.permute(1, 0, 3, 2)])
def test_any_tensor_is_served(of: Callable[[Tensor], Tensor]) -> None:
    x = of(_strided()).requires_grad_()
    y = fake_quantize(x, (2, 3), 4)
    assert torch.equal(y, eager.fake_quantize(x.detach().contiguous(), (2, 3), 4)[0])
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad == 1).all()


def test_an_installation_without_a_compiler_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, inverse = tensor((2, 5, 6, 6), 0, False), torch.rand(1, 5, 1, 1) + 0.1
    fused = kernels.fake_quantize(x, (2, 3), 4), kernels.codes(x, inverse, 0, 7)
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert torch.equal(kernels.fake_quantize(x, (2, 3), 4), fused[0])
    assert torch.equal(kernels.codes(x, inverse, 0, 7), fused[1])
