import torch
from torch import nn

from services.quantizer.calibrate import calibrate
from services.quantizer.config import Quantization
from services.quantizer.graph import ceiling_of, module_of
from services.quantizer.learned import ActivationQuantizer
from services.quantizer.reach import IMAGE_REACH, Moments, deviations, propagate, reach
from services.quantizer.student import build_student
from tests.support.models import Residual, captured
from tests.support.networks import NETWORKS

torch.set_num_threads(1)
SHAPE = (3, 8, 8)


def test_moments_follow_the_graph_and_match_samples() -> None:
    model = captured(Residual(), SHAPE)
    known = propagate(model)
    relu = next(n for n in model.graph.nodes if isinstance(module_of(model, n), nn.ReLU))
    norm = model.get_submodule("stem.1")
    assert isinstance(norm, nn.BatchNorm2d)
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, norm.num_features, generator=rng) * norm.weight.detach().abs() + norm.bias.detach()
    samples = normal.relu()
    assert torch.allclose(known[relu].mean, samples.mean(0), atol=0.01)
    assert torch.allclose(known[relu].variance, samples.var(0), atol=0.02)
    # The reach counts from before the rectifier: about one value in a thousand lies beyond 3.2 deviations.
    beyond = (normal.abs() > reach(known[relu], 4)).float().mean(0)
    assert deviations(4) == 3.2
    assert (beyond < 2e-3).all()


def test_a_sum_adds_means_and_variances() -> None:
    model = captured(Residual(), SHAPE)
    known = propagate(model)
    add = next(n for n in model.graph.nodes if n.op == "call_function")
    left, right = (known[a] for a in add.args)
    assert torch.allclose(known[add].mean, left.mean + right.mean)
    assert torch.allclose(known[add].variance, left.variance + right.variance)
    assert isinstance(known[add], Moments)


def test_ranges_start_no_lower_than_promised_whatever_the_images() -> None:
    student = build_student(captured(Residual(), SHAPE), Quantization(8, 8))
    calibrate(student, torch.zeros(4, *SHAPE))  # images that show nothing
    quantizers = {n: m for n, m in student.named_modules() if isinstance(m, ActivationQuantizer)}
    promised = [q for q in quantizers.values() if q.reach is not None]
    assert len(promised) == len(quantizers)
    for quantizer in promised:
        assert quantizer.reach is not None
        assert (quantizer.scale() * quantizer.code_range.hi >= quantizer.reach * 0.999).all()
    image = quantizers["codes_x"]
    assert torch.allclose(image.scale() * 127, torch.full((3,), IMAGE_REACH))


def test_a_mean_of_bounded_values_is_as_bounded() -> None:
    model = captured(NETWORKS["SamePadding"](), SHAPE)
    pool = next(n for n in model.graph.nodes if isinstance(module_of(model, n), nn.AdaptiveAvgPool2d))
    assert ceiling_of(model, pool) == 6.0


def test_fine_codes_cover_all_that_a_ceiling_allows_and_coarse_ones_what_is_likely() -> None:
    """Real tails are heavier than a normal distribution's: a clip by its deviations costs more than it saves."""
    ranges = {}
    for bits in (4, 8):
        student = build_student(captured(NETWORKS["SamePadding"](), SHAPE), Quantization(8, bits))
        calibrate(student, torch.zeros(4, *SHAPE))  # images that show nothing
        quantizer = student.get_submodule("codes_relu6")
        assert isinstance(quantizer, ActivationQuantizer)
        assert quantizer.ceiling == 6.0
        ranges[bits] = quantizer.scale() * quantizer.code_range.hi
    assert torch.allclose(ranges[8], torch.full_like(ranges[8], 6.0))
    assert float(ranges[4].max()) < 6.0
