"""Optimizers of the two families of students, and their state as tensors by name.

A simulated student is trained as published: SGD with Nesterov momentum at one rate for all weights. The layers of a
deployable one differ in scale by orders of magnitude, since activations move theirs into the weights, and its weights
live on grids. There Adam takes steps in units of each value: of the root mean square of its tensor, so that all layers
cross their grids at the same pace, but of no more than a few codes of its own grid. At eight bits, and in channels that
are small beside their neighbours, steps would be many codes otherwise, and training would lose more than rounding did.
The logarithms of the scales move by parts of a code, too.
"""

from typing import Any

import torch
from torch import Tensor, nn

from services.quantizer.config import Training
from services.quantizer.learned import ActivationQuantizer, QuantizedLayer
from services.quantizer.student import trainable

SCALE_CODES = 0.0135  # the rate of the logarithms of the scales: an iteration moves a range's end by so many codes
FEWEST_CODES = 15  # of a range that its scale's rate reckons with: coarser ones move no faster, 0.09 % an iteration
MOST_CODES = 2.5  # that the unit of a weight may be, about the root mean square of a row at four bits
ADAM_BETA2 = 0.99  # a training is short: the mean square of a gradient must not take a thousand steps to settle
EPSILON = 1e-12  # beside the root mean square of a gradient, by codes


class CodeAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015) that moves each value by at most about the rate times a unit of its own.

    Args:
        groups: Lists of parameters with "initial_lr" and "weight_decay" (decoupled, Loshchilov & Hutter 2019).
        units: Of each value, shaped as its parameter. They belong to the state.
        betas: Of the means of the gradients and of their squares.
    """

    def __init__(
        self, groups: list[dict[str, Any]], units: dict[nn.Parameter, Tensor], betas: tuple[float, float]
    ) -> None:
        super().__init__(groups, {"betas": betas})
        for p, unit in units.items():
            square = torch.zeros_like(p)
            mean = torch.zeros_like(p)
            self.state[p] = {"step": torch.zeros(()), "unit": unit, "exp_avg": mean, "exp_avg_sq": square}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here is evaluated twice
        """Move each parameter that has a gradient, by its group's "lr"."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                count = int(state["step"])
                gradient = p.grad * state["unit"]
                mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
                square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
                size = (square / (1 - beta2**count)).sqrt_().add_(EPSILON)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(mean * state["unit"], size, value=-group["lr"] / (1 - beta1**count))


def optimizer_for(student: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Return the optimizer of a student whose ranges are set; "initial_lr" is the rate before the schedule."""
    weights, scales = trainable(student)
    if not scales:
        group = {"params": weights, "initial_lr": training.rate_of_weights}
        return torch.optim.SGD(
            [group],
            training.rate_of_weights,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            nesterov=training.momentum > 0,
            fused=True,
        )
    groups = [
        {"params": weights, "initial_lr": training.rate_of_weights, "weight_decay": training.weight_decay},
        {"params": scales, "initial_lr": SCALE_CODES, "weight_decay": 0.0},
    ]
    return CodeAdam(groups, _units(student), (training.momentum, ADAM_BETA2))


@torch.no_grad()
def _units(student: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Return the unit of each value, shaped as its parameter; a bias counts as a weight at half its input's range."""
    # What has no grid, such as the affine values of a BatchNorm layer that no layer takes in, goes by its size alone.
    units = {p: torch.full_like(p, float(p.square().mean().sqrt())) for p in student.parameters()}
    for module in student.modules():
        if isinstance(module, ActivationQuantizer) and isinstance(module.log_scale, nn.Parameter):
            units[module.log_scale] = _of_a_range(module.log_scale, module.code_range.hi)
        elif isinstance(module, QuantizedLayer):
            code = MOST_CODES * module.grid.spacing * module.log_step.exp()
            by_row = code.view(-1, *[1] * (module.weight.dim() - 1))
            size, size_of_bias = (p.square().mean().sqrt() for p in (module.weight, module.bias))
            unit = torch.minimum(size, by_row / module.input_scale())
            units[module.weight] = torch.empty_like(module.weight).copy_(unit)
            half = module.quantizer.code_range.hi / 2
            units[module.bias] = torch.minimum(size_of_bias if size_of_bias > 0 else size, code * half)
            units[module.log_step] = _of_a_range(module.log_step, module.grid.limit)
    return units


def _of_a_range(logarithm: Tensor, codes: int) -> Tensor:
    return torch.full_like(logarithm, 1 / max(codes, FEWEST_CODES))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state: rates of the groups, and each parameter's tensors as "index.name"."""
    groups = optimizer.param_groups
    found = {"rates": torch.tensor([group["initial_lr"] for group in groups], dtype=torch.float64)}
    for index, parameter in enumerate(p for group in groups for p in group["params"]):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{index}.{name}"] = value
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Go back to a state that ``optimizer_tensors`` returned."""
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for key, value in tensors.items():
        if key == "rates":
            for group, rate in zip(optimizer.param_groups, value.tolist(), strict=True):
                group["initial_lr"] = rate
            continue
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        # As the optimizer makes them: on the device and in the memory format of the parameter.
        like = torch.empty_like(value, device="cpu") if name == "step" else torch.empty_like(parameter)
        optimizer.state[parameter][name] = like.copy_(value)
