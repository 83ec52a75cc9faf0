import pytest
import torch
from torch.nn import functional as F

from services.generator.bn_statistics import BatchNormStatistics
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
    synthesizer = _synthesizer(bounded=bounded)
    drawn = synthesizer.draw(train=False)
    steps: list[None] = []
    refined = synthesizer.refine(drawn, 20, lambda: steps.append(None))
    assert len(steps) == 20
    before, after = _losses(drawn), _losses(refined)
    assert after[0] < 0.8 * before[0]
    assert after[1] < 0.8 * before[1]
    assert torch.equal(refined.labels, drawn.labels)
    assert refined.images.shape == drawn.images.shape
    assert refined.images.is_contiguous()
    if bounded:
        span = (WHITE - BLACK).view(1, -1, 1, 1)
        place = (refined.images - BLACK.view(1, -1, 1, 1)) / span
        assert 0 < float(place.min()) < float(place.max()) < 1


def test_later_draws_stay_as_they_were() -> None:
    one, other = _synthesizer(), _synthesizer()
    one.refine(one.draw(train=False), 2)
    other.draw(train=False)
    assert torch.equal(one.draw(train=False).images, other.draw(train=False).images)


def test_a_batch_that_waits_for_its_step_comes_first() -> None:
    synthesizer = _synthesizer()
    drawn = synthesizer.draw()
    with pytest.raises(RuntimeError, match="no step yet"):
        synthesizer.refine(drawn, 1)


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
    with BatchNormStatistics(teacher) as statistics:
        teacher(images)
        assert float(statistics.take_loss(relative=True)) == pytest.approx(sum(terms) / len(norms), rel=1e-10)
