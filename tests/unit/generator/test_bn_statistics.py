from typing import Any

import pytest
import torch
from torch import fx, nn

from services.generator.bn_statistics import BatchNormStatistics
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
