from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from services.quantizer.config import ActivationGranularity, WeightGranularity
from services.quantizer.fake_quant import DynamicActivation, activation_dims, fake_quantize, weight_dims

torch.set_num_threads(1)


def reference(rows: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return values and steps by a float64 loop over the groups, straight from the equations (a group is a row)."""
    out, steps = np.empty(rows.shape), np.empty(len(rows))
    for i, row in enumerate(rows.astype(np.float64)):
        scale = (2**bits - 1) / max(row.max() - row.min(), 1e-8)
        zero = np.round(scale * row.min()) + 2 ** (bits - 1)
        out[i] = (np.round(scale * row - zero) + zero) / scale
        steps[i] = 1 / scale
    return out, steps


def test_equals_the_published_functions(shared_data: Path) -> None:
    vectors = np.load(shared_data / "granq_vectors.npz")
    names = [name for name in vectors.files if name.endswith("_x")]
    assert names
    for name in names:
        bits = int(name.split("_b")[1].split("_")[0])
        x = torch.from_numpy(vectors[name])
        got = fake_quantize(x, activation_dims(x.dim(), ActivationGranularity.PER_SAMPLE_CHANNEL), bits)
        difference = np.abs(got.numpy() - vectors[name[:-1] + "y"])
        assert (difference > 2e-6).mean() <= 1e-4, name


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    bits=st.integers(2, 8),
    data=st.data(),
)
def test_equals_a_loop_in_double_precision(shape: tuple[int, ...], bits: int, data: st.DataObject) -> None:
    scale = data.draw(st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]))
    values = st.one_of(st.floats(-1, 1, width=32), st.just(0.5))  # repeated values make constant groups likely
    x = data.draw(hnp.arrays(np.float32, shape, elements=values)) * np.float32(scale)
    got = fake_quantize(torch.from_numpy(x), (2, 3), bits).numpy().reshape(shape[0] * shape[1], -1)
    rows = x.reshape(shape[0] * shape[1], -1)
    want, steps = reference(rows, bits)
    # float32 may round a value that lies between two codes to the other one: at most one step away, and never further
    # from the input than the step plus float32's resolution of the values themselves.
    error = np.abs(got - want)
    resolution = 8 * np.finfo(np.float32).eps * np.abs(rows).max(1, keepdims=True)
    assert (error <= steps[:, None] * (1 + 1e-3) + resolution).all()
    exact = np.abs(rows.astype(np.float64) / steps[:, None] % 1 - 0.5) > 1e-2  # clear of a tie
    small = np.abs(rows).max(1, keepdims=True) / steps[:, None] < 2**14  # codes that float32 resolves to 1e-3
    assert (error <= 1e-2 * steps[:, None] + resolution)[exact & small].all()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_result_has_at_most_two_to_the_bits_levels_and_keeps_the_ends(bits: int, seed: int) -> None:
    x = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
    got = fake_quantize(x, (2, 3), bits)
    for group, original in zip(got.flatten(0, 1).flatten(1), x.flatten(0, 1).flatten(1), strict=True):
        step = (original.max() - original.min()) / (2**bits - 1)
        assert len(group.unique()) <= 2**bits
        assert (group - original).abs().max() <= 0.5 * step * 1.001


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_not_finite(bad: float) -> None:
    x = torch.zeros(1, 2, 2, 2)
    x[0, 1, 0, 1] = bad
    with pytest.raises(ValueError, match="NaN, infinity"):
        fake_quantize(x, (2, 3), 4)


def test_refuses_a_range_beyond_float32_and_an_empty_tensor() -> None:
    with pytest.raises(ValueError, match="range beyond float32"):
        fake_quantize(torch.tensor([[3e38, -3e38]]), (1,), 4)
    with pytest.raises(ValueError, match="empty"):
        fake_quantize(torch.zeros(0, 3, 2, 2), (2, 3), 4)


def test_gradient_is_the_identity() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    weight = torch.randn(2, 3, 4, 4)
    (fake_quantize(x, (2, 3), 3) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight)


def test_granularities_group_as_they_say() -> None:
    x = torch.randn(4, 3, 5, 5)
    x[2, 1] *= 100  # an outlier in one sample and channel
    fine = fake_quantize(x, activation_dims(4, ActivationGranularity.PER_SAMPLE_CHANNEL), 4)
    coarse = fake_quantize(x, activation_dims(4, ActivationGranularity.PER_TENSOR), 4)
    assert (fine - x)[0].abs().max() < (coarse - x)[0].abs().max() / 10
    w = torch.randn(6, 5, 1, 1)
    # One value has its own range, and so passes unquantized.
    assert torch.allclose(fake_quantize(w, weight_dims(4, WeightGranularity.PER_KERNEL), 3), w, rtol=1e-6)
    assert not torch.allclose(fake_quantize(w, weight_dims(4, WeightGranularity.PER_OUTPUT_CHANNEL), 3), w, rtol=1e-2)


def test_per_tensor_range_is_a_corrected_average_and_then_frozen() -> None:
    quantizer = DynamicActivation(8, ActivationGranularity.PER_TENSOR)
    batches = [torch.rand(2, 3, 4, 4) * k for k in (1, 2, 3)]
    for batch in batches:
        quantizer(batch)
    weights = [0.1 * 0.9 ** (2 - i) for i in range(3)]
    average = sum(w * float(b.max()) for w, b in zip(weights, batches, strict=True)) / sum(weights)
    quantizer.tracking = False
    clipped = quantizer(torch.full((1, 1, 2, 2), 100.0))
    assert float(clipped.max()) == pytest.approx(average, rel=0.02)
    assert quantizer.steps == 3


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (6, 3)])
def test_per_channel_ranges_are_those_of_single_channels(shape: tuple[int, ...]) -> None:
    channels = DynamicActivation(4, ActivationGranularity.PER_CHANNEL, shape[1])
    alone = [DynamicActivation(4, ActivationGranularity.PER_TENSOR) for _ in range(shape[1])]
    batches = [torch.randn(shape) * torch.tensor([1.0, 10.0, 0.1]).view(1, 3, *[1] * (len(shape) - 2)) for _ in "123"]
    for index, x in enumerate(batches):
        for module in (channels, *alone):
            module.tracking = index < 2
        got = channels(x)
        for c, module in enumerate(alone):
            assert torch.equal(got[:, c], module(x[:, c : c + 1])[:, 0])
