"""Optimizers of the two families of students, and their state as tensors by name.

A simulated student is trained as published: SGD with Nesterov momentum at one rate for all weights. The layers of a
deployable one differ in scale by orders of magnitude, since activations move theirs into the weights, and its weights
live on grids. There Adam takes steps relative to each tensor's root mean square, so that all layers cross their
grids at the same pace; the logarithms of the scales, relative by nature, have a rate of their own.
"""

import torch
from torch import Tensor, nn

from services.quantizer.config import Training
from services.quantizer.learned import QuantizedLayer
from services.quantizer.student import trainable

SCALE_LEARNING_RATE = 3e-3  # of Adam on the logarithms of the scales: about 0.3 % a step at most
ADAM_BETA2 = 0.99  # a training is short: the mean square of a gradient must not take a thousand steps to settle


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
        )
    sizes = _sizes(student)
    groups = [{"params": [p], "initial_lr": training.rate_of_weights * sizes[p]} for p in weights]
    return torch.optim.AdamW(
        [*groups, {"params": scales, "initial_lr": SCALE_LEARNING_RATE, "weight_decay": 0.0}],
        training.rate_of_weights,
        betas=(training.momentum, ADAM_BETA2),
        weight_decay=training.weight_decay,
    )


def _sizes(student: nn.Module) -> dict[nn.Parameter, float]:
    """Return the root mean square of each parameter; of a layer's weight where a bias is zero."""
    sizes = {p: float(p.detach().square().mean().sqrt()) for p in student.parameters()}
    for module in student.modules():
        if isinstance(module, QuantizedLayer):
            sizes[module.bias] = sizes[module.bias] or sizes[module.weight]
    return sizes


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
