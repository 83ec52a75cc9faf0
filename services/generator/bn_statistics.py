"""How far a batch's statistics are from those that the teacher's BatchNorm layers saw in training."""

from typing import Any, Self

import torch
from torch import Tensor, nn


class _MeanAndVariance(torch.autograd.Function):
    """Mean and biased variance of each channel of ``x``, N×C×H×W → C and C.

    ``torch.var_mean`` takes twelve times as long on channels-last images and its gradient several passes; the gradient
    by x is ∂L/∂mean/M + 2·∂L/∂var·(x − mean)/M with M = N·H·W, one multiply and add for each value.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        mean = rows.mean(0)
        ctx.save_for_backward(x, mean)
        return mean, (rows - mean).square_().mean(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        by_mean, by_variance = grads
        count = x.numel() // x.shape[1]
        slope = by_variance * (2 / count)
        return torch.addcmul((by_mean / count - slope * mean).view(1, -1, 1, 1), x, slope.view(1, -1, 1, 1))


class BatchNormStatistics:
    """Listens to the inputs of a teacher's BatchNorm2d layers.

    A context manager: the hooks are removed at its end.

    Args:
        teacher: A network in eval mode, each of whose BatchNorm2d layers runs once in a forward pass.

    Raises:
        ValueError: The network has no BatchNorm2d.
    """

    def __init__(self, teacher: nn.Module) -> None:
        layers = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
        if not layers:
            raise ValueError("the teacher has no BatchNorm2d")
        self._found: list[tuple[nn.BatchNorm2d, Tensor, Tensor]] = []
        self._count = len(layers)
        self._hooks = [layer.register_forward_pre_hook(self._listen) for layer in layers]

    def _listen(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not isinstance(layer, nn.BatchNorm2d) or layer.running_mean is None or layer.running_var is None:
            raise TypeError(f"{type(layer).__name__} has no running statistics")
        x = inputs[0]
        self.add(layer, *_MeanAndVariance.apply(x.float() if x.dtype is torch.bfloat16 else x))

    def add(self, layer: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
        """Take the mean and the biased variance, C each, of what a layer read, where it does not run by itself."""
        self._found.append((layer, mean, variance))

    def take_loss(self, *, relative: bool = False) -> torch.Tensor:
        """Return L_BNS of the forward pass since the last call, a scalar with gradient.

        The mean over the layers of MSE(batch mean, running mean) + MSE(biased batch variance, running variance), as
        published. ``relative`` takes the errors of means and of standard deviations in units of the running standard
        deviation instead, so that channels of all sizes count alike.

        Raises:
            RuntimeError: Not every layer ran exactly once since then.
        """
        found, self._found = self._found, []
        if len(found) != self._count:
            raise RuntimeError(f"{len(found)} BatchNorm layers ran, expected {self._count}")
        layers, means, variances = zip(*found, strict=True)
        # All channels in one row: small operations on each layer would take longer than their arithmetic.
        error = torch.cat(means) - torch.cat([layer.running_mean for layer in layers])
        expected = torch.cat([layer.running_var for layer in layers])
        excess = torch.cat(variances) - expected
        if relative:
            floor = torch.cat([mean.new_full(mean.shape, layer.eps) for mean, layer in zip(means, layers, strict=True)])
            error = error / (expected + floor).sqrt()
            excess = ((torch.cat(variances) + floor) / (expected + floor)).sqrt() - 1
        share = torch.cat([mean.new_full(mean.shape, 1 / (len(mean) * self._count)) for mean in means])
        return ((error.square() + excess.square()) * share).sum()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
