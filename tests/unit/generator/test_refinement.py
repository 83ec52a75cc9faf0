import pytest
import torch
from torch.nn import functional as F

from services.generator.bn_statistics import BatchNormStatistics
from services.generator.scenes import scenes
from services.generator.synthesis import Batch, SynthesisParameters, Synthesizer
from tests.support.models import Residual, captured

SHAPE = (3, 12, 9)
BLACK, WHITE = torch.tensor([-1.0, -0.5, -2.0]), torch.tensor([1.0, 2.5, 0.5])


def _synthesizer(*, bounded: bool = True) -> Synthesizer:
    return Synthesizer(
        captured(Residual(), SHAPE),
        SHAPE,
        10,
        SynthesisParameters(batch_size=32, seed=3),
        torch.device("cpu"),
        (BLACK, WHITE) if bounded else None,
    )


def _losses(batch: Batch) -> tuple[float, float]:
    teacher = captured(Residual(), SHAPE)
    with BatchNormStatistics(teacher) as statistics, torch.no_grad():
        logits = teacher(batch.images)
        torch.testing.assert_close(logits, batch.logits, rtol=1e-4, atol=1e-4)
        return float(statistics.take_loss(relative=True)), float(F.cross_entropy(logits, batch.labels))


@pytest.mark.parametrize("bounded", [True, False])
def test_statistics_and_labels_are_met_better(bounded: bool) -> None:
    steps: list[None] = []
    rough = _synthesizer(bounded=bounded).draw_refined(40, 0)
    refined = _synthesizer(bounded=bounded).draw_refined(40, 20, lambda: steps.append(None))
    assert len(steps) == 20
    before, after = _losses(rough), _losses(refined)
    assert after[0] < 0.8 * before[0]
    assert after[1] < before[1]
    assert torch.equal(refined.labels, rough.labels)
    assert refined.images.shape == (40, *SHAPE)
    assert refined.images.is_contiguous()
    black, white = (BLACK, WHITE) if bounded else (torch.full((3,), -2.0), torch.full((3,), 2.0))
    place = (refined.images - black.view(1, -1, 1, 1)) / (white - black).view(1, -1, 1, 1)
    assert 0 < float(place.min()) < float(place.max()) < 1


def test_draws_go_on_from_a_stored_state_alike() -> None:
    one, other = _synthesizer(), _synthesizer()
    one.draw_refined(4, 1)
    other.restore(one.state())
    assert torch.equal(one.draw_refined(4, 2).images, other.draw_refined(4, 2).images)
    assert torch.equal(one.draw(train=False).images, other.draw(train=False).images)


def test_a_batch_that_waits_for_its_step_comes_first() -> None:
    synthesizer = _synthesizer()
    synthesizer.draw()
    with pytest.raises(RuntimeError, match="no step yet"):
        synthesizer.draw_refined(4, 1)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 9, 17), (5, 1, 1)])
def test_scenes_fill_the_range_of_pixels(shape: tuple[int, int, int]) -> None:
    drawn = scenes(24, shape, torch.Generator().manual_seed(0))
    assert drawn.shape == (24, *shape)
    assert drawn.dtype is torch.float32
    assert torch.isfinite(drawn).all()
    assert 0 <= float(drawn.min()) < 0.2
    assert 0.8 < float(drawn.max()) <= 1
    assert torch.equal(drawn, scenes(24, shape, torch.Generator().manual_seed(0)))
    # No two of them are alike.
    assert float(torch.cdist(drawn.flatten(1), drawn.flatten(1)).add(torch.eye(24)).min()) > 0


def test_scenes_have_areas_edges_and_the_spectrum_of_natural_images() -> None:
    drawn = scenes(200, (1, 64, 64), torch.Generator().manual_seed(1))
    steps = drawn.diff(dim=3).abs()
    assert float((steps < 0.02).float().mean()) > 0.4
    assert float((steps > 0.2).float().mean()) > 0.005
    # The amplitude falls about as 1/f: from 4 to 16 periods a side by about four.
    amplitude = torch.fft.rfft2(drawn - drawn.mean((2, 3), keepdim=True)).abs().square().mean((0, 1)).sqrt()
    assert 2 < float(amplitude[0, 4] / amplitude[0, 16]) < 8


def test_relative_loss_counts_in_running_deviations() -> None:
    teacher = captured(Residual(), SHAPE).double()
    images = torch.randn(4, *SHAPE, dtype=torch.float64)
    terms = []

    def listen(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, torch.nn.BatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        deviation = (layer.running_var + layer.eps).sqrt()
        shift = (mean - layer.running_mean) / deviation
        stretch = (var + layer.eps).sqrt() / deviation - 1
        terms.append(float((shift**2).mean() + (stretch**2).mean()))

    norms = [module for module in teacher.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(listen) for norm in norms]
    with torch.no_grad():
        teacher(images)
    for hook in hooks:
        hook.remove()
    with BatchNormStatistics(teacher) as statistics, torch.no_grad():
        teacher(images)
        assert float(statistics.take_loss(relative=True)) == pytest.approx(sum(terms) / len(norms), rel=1e-10)
