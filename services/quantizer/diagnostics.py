"""What a training did to each layer: noise against the teacher, clip ranges, and the losses, for people to look at.

A layer is compared where its BatchNorm ends, or at its own output where it has none, since a deployable student's layer
has its BatchNorm folded in. With t the teacher's values there and s the student's, over held-out synthetic images,

    SQNR = 10·log10(Σ t² / Σ (s − t)²)   in decibel

which counts the errors of all layers before it, too.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from services.quantizer.curve import LossCurve
from services.quantizer.fake_quant import DynamicActivation, group_range, weight_dims
from services.quantizer.features import keep_output
from services.quantizer.graph import BATCH_NORM_TYPES, input_of, layers, module_of
from services.quantizer.learned import QuantizedLayer
from services.quantizer.student import tracking_paused
from services.quantizer.training import Trainer

VERSION = 1
IMAGES = 64  # of the held-out ones: enough for a mean over all positions, and seconds even for large networks
ELEMENTS = 2**19  # of input that a batch may hold, so that the outputs of all layers fit in memory

Layers = dict[str, dict[str, Any]]
"""By layer: "sqnr_db", "input_scale" and "weight_step", the latter as {"min", "median", "max"}; None: there is none."""


@torch.no_grad()
def measure(teacher: fx.GraphModule, student: fx.GraphModule, images: Tensor, on_batch: Callable[[], None]) -> Layers:
    """Compare a student, whose ranges are set, with its teacher; both are left as they are.

    Args:
        teacher: The float graph with its BatchNorm layers, in evaluation mode, on the student's device.
        student: Made of that graph.
        images: N×C×H×W float32, not trained on; the first 64 are used.
        on_batch: Called for each batch; what it raises ends the measurement.

    Returns:
        The figures of each quantized layer, in order of execution.
    """
    points = _points(teacher, student)
    signal, noise = (torch.zeros(len(points), dtype=torch.float64) for _ in range(2))
    device = next(student.parameters()).device
    size = max(1, min(IMAGES, ELEMENTS // max(1, images[0].numel())))
    with (
        _outputs(teacher, [taught for taught, _ in points.values()]) as taught_outputs,
        _outputs(student, [learned for _, learned in points.values()]) as learned_outputs,
        tracking_paused(student),
    ):
        for batch in images[:IMAGES].split(size):
            on_batch()
            batch = batch.to(device)
            teacher(batch)
            student(batch)
            for index, (taught, learned) in enumerate(points.values()):
                wanted = taught_outputs.pop(taught).double()
                signal[index] += wanted.square().sum().cpu()
                noise[index] += (learned_outputs.pop(learned).double() - wanted).square().sum().cpu()
    ranges = {str(node.target): _ranges(student, node) for node, _ in layers(teacher)}
    return {
        name: {"sqnr_db": _decibel(float(signal[index]), float(noise[index])), **ranges[name]}
        for index, name in enumerate(points)
    }


def _points(teacher: fx.GraphModule, student: fx.GraphModule) -> dict[str, tuple[str, str]]:
    """Return by layer the modules of teacher and student whose outputs are compared."""
    kept = dict(student.named_modules())
    points: dict[str, tuple[str, str]] = {}
    for node, _ in layers(teacher):
        name = str(node.target)
        users = list(node.users)
        taught = name
        if len(users) == 1 and isinstance(module_of(teacher, users[0]), BATCH_NORM_TYPES):
            taught = str(users[0].target)
        points[name] = taught, taught if taught in kept else name
    return points


@contextmanager
def _outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of the named modules for the length of the block."""
    kept: dict[str, Tensor] = {}

    handles = [model.get_submodule(name).register_forward_hook(keep_output(kept, name)) for name in names]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _ranges(student: fx.GraphModule, of: fx.Node) -> dict[str, Any]:
    """Return the scales of a layer's input and weight; ``of`` is its node in the teacher."""
    layer = student.get_submodule(str(of.target))
    if isinstance(layer, QuantizedLayer):
        return {"input_scale": _spread(layer.quantizer.scale()), "weight_step": _spread(layer.log_step.exp())}
    quantize: Any = layer.quantize
    weight = layer.get_parameter("weight")
    lo, hi = group_range(weight, weight_dims(weight.dim(), quantize.granularity))
    return {"input_scale": None, "weight_step": _spread((hi - lo) / (2**quantize.bits - 1))}


def _formats(student: fx.GraphModule) -> dict[str, dict[str, Any]]:
    """Return the number formats of each layer."""
    formats: dict[str, dict[str, Any]] = {}
    for node in student.graph.nodes:
        layer = module_of(student, node)
        if isinstance(layer, QuantizedLayer):
            codes = layer.quantizer.code_range
            formats[str(node.target)] = {
                "weight_bits": layer.bits.weight,
                "activation_bits": layer.bits.activation,
                "activation_signed": codes.signed,
                "activation_codes": [codes.lo, codes.hi],
            }
            continue
        quantize: Any = getattr(layer, "quantize", None)
        if quantize is not None:
            # A simulated layer; what it reads is quantized behind a ReLU, and float elsewhere.
            source = module_of(student, input_of(node))
            formats[str(node.target)] = {
                "weight_bits": quantize.bits,
                "activation_bits": source.bits if isinstance(source, DynamicActivation) else None,
                "activation_signed": None,
                "activation_codes": None,
            }
    return formats


def _spread(values: Tensor) -> dict[str, float]:
    values = values.detach().flatten()
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}


def _decibel(signal: float, noise: float) -> float | None:
    """Return the ratio, or None where it is no finite number: a silent layer, or one without any error."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def summary(trainer: Trainer, images: int, before: Layers, after: Layers, generator: bool) -> dict[str, Any]:
    """Return all that is known of a training, for a JSON file.

    Args:
        trainer: At its end.
        images: How many were held out; the first 64 were measured on.
        before: What ``measure`` found before the first iteration.
        after: What it found at the end.
        generator: Whether a generator learned along, so that there is a loss of it.
    """
    formats = _formats(trainer.student)
    return {
        "format": "granq-diagnostics",
        "version": VERSION,
        "images": min(images, IMAGES),
        "layers": [
            {"name": name, **formats[name], "before": before[name], "after": figures} for name, figures in after.items()
        ],
        "curve": _curve(trainer, trainer.curve, generator),
    }


def _curve(trainer: Trainer, curve: LossCurve, generator: bool) -> dict[str, Any]:
    training, points = trainer.training, curve.points()
    warmup = training.warmup_iterations
    return {
        "every": curve.every,
        "warmup_iterations": warmup,
        "iteration": [iteration for iteration, _, _ in points],
        "loss_student": [student for _, student, _ in points],
        "loss_generator": [loss for _, _, loss in points] if generator else None,
        # Of the weights, in the last iteration of the stretch; they rest during warm-up.
        "rate": [training.rate_of_weights * trainer.rate(i - 1) if i > warmup else 0.0 for i, _, _ in points],
    }


def to_json(diagnostics: dict[str, Any]) -> bytes:
    """Return the file's content; equal diagnostics give equal bytes."""
    return (json.dumps(diagnostics, indent=1, allow_nan=False) + "\n").encode()
