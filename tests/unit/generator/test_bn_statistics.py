from typing import Any

import pytest
import torch
from torch import fx, nn

from services.generator.bn_statistics import BatchNormStatistics, _MeanAndVariance
from tests.support.models import Residual, captured


def _reference(module: fx.GraphModule, images: torch.Tensor) -> float:
    """L_BNS by loops in float64, from the definition."""
    inputs: list[tuple[torch.Tensor, nn.BatchNorm2d]] = []

    class Recorder(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> object:
            layer = module.get_submodule(str(target))
            if isinstance(layer, nn.BatchNorm2d):
                inputs.append((args[0], layer))
            return layer(*args)

    Recorder(module).run(images)
    total = 0.0
    for x, layer in inputs:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        means = variances = 0.0
        for channel in range(x.shape[1]):
            values = [float(v) for v in x[:, channel].flatten()]
            mean = sum(values) / len(values)
            var = sum((v - mean) ** 2 for v in values) / len(values)
            means += (mean - float(layer.running_mean[channel])) ** 2
            variances += (var - float(layer.running_var[channel])) ** 2
        total += means / x.shape[1] + variances / x.shape[1]
    return total / len(inputs)


def test_equals_the_definition() -> None:
    teacher = captured(Residual(), (3, 8, 8)).double().requires_grad_(False)
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    with BatchNormStatistics(teacher) as statistics:
        teacher(images)
        loss = statistics.take_loss().detach()
    assert float(loss) == pytest.approx(_reference(teacher, images), rel=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mean_and_variance_and_their_gradient_are_those_of_var_mean(layout: torch.memory_format) -> None:
    x = (3 * torch.randn(4, 3, 5, 6, dtype=torch.float64) + 10).to(memory_format=layout).requires_grad_()
    weights = torch.randn(2, 3, dtype=torch.float64)

    def loss(mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return (weights[0] * mean**2 + weights[1] * var**2).sum()

    mean, var = _MeanAndVariance.apply(x)
    wanted_var, wanted_mean = torch.var_mean(x, (0, 2, 3), correction=0)
    assert torch.allclose(mean, wanted_mean)
    assert torch.allclose(var, wanted_var)
    (got,) = torch.autograd.grad(loss(mean, var), x)
    (wanted,) = torch.autograd.grad(loss(wanted_mean, wanted_var), x)
    assert torch.allclose(got, wanted)
    assert got.is_contiguous(memory_format=layout)


def test_reaches_the_images() -> None:
    teacher = captured(Residual(), (3, 8, 8)).requires_grad_(False)
    images = torch.randn(6, 3, 8, 8, requires_grad=True)
    with BatchNormStatistics(teacher) as statistics:
        teacher(images)
        statistics.take_loss().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


def test_every_layer_counts_once() -> None:
    teacher = captured(Residual(), (3, 8, 8))
    with BatchNormStatistics(teacher) as statistics:
        with pytest.raises(RuntimeError):
            statistics.take_loss()
        teacher(torch.randn(2, 3, 8, 8))
        teacher(torch.randn(2, 3, 8, 8))
        with pytest.raises(RuntimeError):
            statistics.take_loss()
    teacher(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        BatchNormStatistics(nn.Linear(2, 2))
