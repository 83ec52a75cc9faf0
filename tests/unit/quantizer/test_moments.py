import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from services.quantizer.calibrate import MARGIN, calibrate
from services.quantizer.config import Quantization
from services.quantizer.graph import ceiling_of, module_of
from services.quantizer.learned import ActivationQuantizer, QuantizedLayer
from services.quantizer.moments import LEAST_SAMPLES, MOST_STRETCH, Moments
from services.quantizer.placement import IMAGE_REACH
from services.quantizer.student import build_student
from tests.support.models import Residual, captured
from tests.support.networks import NETWORKS

torch.set_num_threads(1)
SHAPE = (3, 8, 8)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@given(
    mean=st.floats(-5, 5),
    deviation=st.floats(0.1, 5),
    shift=st.floats(-5, 5),
    ratio=st.floats(1.05 / MOST_STRETCH, 0.95 * MOST_STRETCH),
    flat=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_imposed_moments_are_those_asked_for_and_the_shape_stays(
    mean: float, deviation: float, shift: float, ratio: float, flat: bool
) -> None:
    skewed = torch.rand(40, 2, *(() if flat else (5, 5)), generator=torch.Generator().manual_seed(1)) ** 3
    spread, mid = torch.std_mean(skewed, [d for d in range(skewed.dim()) if d != 1], correction=0, keepdim=True)
    skewed = (skewed - mid) / spread * deviation / ratio + shift
    wanted = Moments(torch.tensor([mean, 0.0]), torch.tensor([deviation, deviation]))
    got = wanted.impose(skewed)
    rows, before = got.transpose(0, 1).flatten(1), skewed.transpose(0, 1).flatten(1)
    assert torch.allclose(rows.mean(1), wanted.mean, atol=1e-3)
    assert torch.allclose(rows.std(1, correction=0), wanted.deviation, rtol=1e-3)
    assert (rows.argsort(1) == before.argsort(1)).float().mean() > 0.95  # but for ties


def test_a_silent_channel_gets_the_mean_and_no_stretched_noise() -> None:
    x = torch.full((LEAST_SAMPLES, 1), 3.0)
    x[0] += 1e-3
    got = Moments(torch.tensor([0.5]), torch.tensor([2.0])).impose(x)
    assert float(got.mean()) == pytest.approx(0.5, abs=1e-5)
    assert float(got.max() - got.min()) <= 1.01e-3 * MOST_STRETCH


def test_too_few_samples_say_nothing_about_moments() -> None:
    x = torch.randn(LEAST_SAMPLES - 1, 3)
    assert Moments(torch.zeros(3), torch.ones(3)).impose(x) is x


def test_layers_keep_the_moments_of_the_norms_that_they_took_in() -> None:
    model = captured(Residual(), SHAPE)
    norm = model.get_submodule("stem.1")
    assert isinstance(norm, nn.BatchNorm2d)
    layer = build_student(model, Quantization(4, 4)).get_submodule("stem.0")
    assert isinstance(layer, QuantizedLayer)
    assert layer.moments is not None
    assert torch.equal(layer.moments.mean, norm.bias)
    assert torch.equal(layer.moments.deviation, norm.weight.abs())


def test_images_that_spread_too_little_give_the_ranges_of_real_ones() -> None:
    """Ranges follow the moments that the model remembers, not the contrast of what it is shown."""
    model = captured(Residual(), SHAPE)
    ranges = []
    for contrast in (0.5, 1.0):
        student = build_student(model, Quantization(8, 8))
        calibrate(student, images(64) * contrast)
        ranges.append({n: m.scale() for n, m in student.named_modules() if isinstance(m, ActivationQuantizer)})
    for name in set(ranges[0]) - {"codes_x"}:
        assert torch.allclose(ranges[0][name], ranges[1][name], rtol=0.25), name


def test_few_bits_cut_off_what_many_bits_cover() -> None:
    ranges = {}
    for bits in (3, 4, 8):
        student = build_student(captured(Residual(), SHAPE), Quantization(8, bits))
        calibrate(student, images(64))
        quantizer = student.get_submodule("codes_relu")
        assert isinstance(quantizer, ActivationQuantizer)
        ranges[bits] = quantizer.scale() * quantizer.code_range.hi
    assert (ranges[3] < ranges[4]).float().mean() > 0.9
    assert (ranges[4] < ranges[8]).all()


def test_a_range_has_a_margin_but_for_the_image() -> None:
    student = build_student(captured(Residual(), SHAPE), Quantization(8, 8))
    seen: dict[str, torch.Tensor] = {}
    quantizers = {n: m for n, m in student.named_modules() if isinstance(m, ActivationQuantizer)}
    for name, quantizer in quantizers.items():
        quantizer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].clone()}))
    calibrate(student, images(64))
    largest = {name: x.abs().transpose(0, 1).flatten(1).amax(1) for name, x in seen.items()}
    for name, quantizer in quantizers.items():
        wanted = largest[name].clamp_min(IMAGE_REACH) if name == "codes_x" else MARGIN * largest[name]
        assert torch.allclose(quantizer.scale() * quantizer.code_range.hi, wanted), name
    assert not any(m._forward_hooks for m in student.modules())


def test_a_mean_of_bounded_values_is_as_bounded() -> None:
    model = captured(NETWORKS["SamePadding"](), SHAPE)
    pool = next(n for n in model.graph.nodes if isinstance(module_of(model, n), nn.AdaptiveAvgPool2d))
    assert ceiling_of(model, pool) == 6.0


def test_fine_codes_cover_all_that_a_ceiling_allows_and_coarse_ones_what_is_likely() -> None:
    """Real tails are heavier than those of images that were made."""
    ranges = {}
    for bits in (4, 8):
        student = build_student(captured(NETWORKS["SamePadding"](), SHAPE), Quantization(8, bits))
        calibrate(student, images(64))
        quantizer = student.get_submodule("codes_relu6")
        assert isinstance(quantizer, ActivationQuantizer)
        assert quantizer.ceiling == 6.0
        ranges[bits] = quantizer.scale() * quantizer.code_range.hi
    assert torch.allclose(ranges[8], torch.full_like(ranges[8], 6.0))
    assert float(ranges[4].max()) < 6.0
