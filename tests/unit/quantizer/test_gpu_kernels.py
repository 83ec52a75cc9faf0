"""The GPU's kernels, on a GPU or else by Triton's interpreter (conftest.py): the same programs, without a compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.quantizer.kernels import eager, gpu
from tests.unit.quantizer.test_kernels import ACTIVATION, SHAPES, WEIGHT
from tests.unit.quantizer.test_kernels import tensor as cpu_tensor

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensor(shape: tuple[int, ...], seed: int, channels_last: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return cpu_tensor(shape, seed, channels_last, dtype).to(DEVICE)


@pytest.fixture(scope="module", autouse=True)
def at_hand() -> None:
    assert gpu.kernels(DEVICE) is not None


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1), st.integers(2, 8), st.sampled_from(ACTIVATION + WEIGHT), st.booleans())
@example((1, 1, 1, 1), 0, 2, (2, 3), False)
@example((2, 3, 100, 100), 1, 4, (0, 1, 2, 3), False)  # more than a program holds
@example((2, 3, 100, 100), 1, 4, (0, 1, 2, 3), True)
@example((3, 20, 24, 24), 2, 5, (2, 3), True)
@example((3, 20, 24, 24), 2, 5, (2, 3), False)
def test_fake_quantization_equals_plain_pytorch(
    shape: tuple[int, ...], seed: int, bits: int, dims: tuple[int, ...], channels_last: bool
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = tensor(shape, seed, channels_last, dtype)
        got = gpu.fake_quantize(x, dims, bits)
        if got is None:
            assert dims == (0, 2, 3)
            continue
        assert bool(got[1])
        want = eager.fake_quantize(x, dims, bits)[0]
        if dtype is torch.bfloat16 and DEVICE.type == "cpu":
            # The interpreter cuts bits off where a GPU rounds.
            exact = eager.fake_quantize(x.float(), dims, bits)[0]
            want = (exact.view(torch.int32) & -(2**16)).view(torch.float32).bfloat16()
        assert torch.equal(got[0], want)
        assert got[0].stride() == x.stride()


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1), st.sampled_from([(0, 1), (0, 127), (-7, 7), (-128, 127)]), st.booleans())
@example((4, 20, 20, 20), 0, (0, 15), False)
@example((4, 20, 20, 20), 0, (0, 15), True)
def test_codes_and_their_gradients_equal_plain_pytorch(
    shape: tuple[int, ...], seed: int, codes: tuple[int, int], channels_last: bool
) -> None:
    x = tensor(shape, seed, channels_last)
    rng = torch.Generator().manual_seed(seed)
    grad = torch.randn(shape, generator=rng).to(DEVICE)
    for scales in ((1, shape[1], 1, 1), (shape[0], 1, 1, 1)):  # of an activation, of a weight
        inverse = (torch.rand(scales, generator=rng) * 9 + 0.1).to(DEVICE)
        got, gradients = gpu.codes(x, inverse, *codes), gpu.codes_backward(grad, x, inverse, *codes)
        assert got is not None
        assert gradients is not None
        assert torch.equal(got, eager.codes(x, inverse, *codes))
        want = eager.codes_backward(grad, x, inverse, *codes)
        assert torch.equal(gradients[0], want[0])
        size = eager.codes_backward(grad.abs(), x, inverse.expand(shape), *codes)[1].abs().sum_to_size(scales)
        assert ((gradients[1] - want[1]).abs() <= 1e-5 * size + 1e-6).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("side", "dims"), [(9, (2, 3)), (9, (0, 1, 2, 3)), (100, (0, 1, 2, 3))])
def test_what_is_not_finite_is_found_wherever_it_lies(
    bad: float, channels_last: bool, side: int, dims: tuple[int, ...]
) -> None:
    for place in ((0, 0, 0, 0), (1, 2, 4, 3), (1, 4, 8, 8)):
        x = tensor((2, 5, side, side), 0, channels_last)
        x[place] = bad
        found = gpu.fake_quantize(x, dims, 4)
        assert found is not None
        assert not bool(found[1])


def test_codes_of_nan_are_nan() -> None:
    x = tensor((1, 40, 3, 3), 0, False)
    x[0, 3, 1, 1] = x[0, 39, 2, 2] = float("nan")
    got = gpu.codes(x, torch.ones(1, 40, 1, 1, device=DEVICE), -7, 7)
    assert got is not None
    assert torch.equal(got.isnan(), x.isnan())


def test_kernels_that_compute_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu.kernels(DEVICE)
    assert found is not None
    monkeypatch.setattr(found, "codes", found.round_to_grid)
    gpu.kernels.cache_clear()
    assert gpu.kernels(DEVICE) is None
    assert gpu.codes(torch.zeros(1, 2, 3, 3, device=DEVICE), torch.ones(1, 2, 1, 1, device=DEVICE), 0, 3) is None
    gpu.kernels.cache_clear()
    monkeypatch.undo()
    assert gpu.kernels(DEVICE) is not None


def test_kernels_compile_for_three_generations_of_gpus_and_round_each_operation() -> None:
    """Orin, Hopper and Blackwell: a fused multiply-add or a quick division would round otherwise."""
    architectures = ["87", "90", "120"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_gpu_kernels", *architectures],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    made = [json.loads(line) for line in run.stdout.splitlines()]
    assert {(str(case["architecture"]), case["kernel"]) for case in made} == {
        (architecture, kernel)
        for architecture in architectures
        for kernel in ("fake_quantize_groups", "round_to_grid", "codes", "codes_backward")
    }
    assert all(case["bytes"] > 1000 and not case["fused"] and not case["approximate"] for case in made)
