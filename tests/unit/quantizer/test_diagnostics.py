"""Figures of the layers against direct computation, and the file and picture made of them."""

import io
import json
import math
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, fx, nn

from services.quantizer import diagnostics, picture
from services.quantizer.batches import Batch, ReplaySource
from services.quantizer.calibrate import calibrate
from services.quantizer.config import ActivationGranularity, GeneratorLosses, Quantization, Training, WeightGranularity
from services.quantizer.fake_quant import DynamicActivation
from services.quantizer.student import build_student, no_grad_copy, simulated_logits
from services.quantizer.training import Trainer
from tests.support.models import Bottleneck, Residual, captured, remember

torch.set_num_threads(1)
SHAPE = (3, 8, 8)
DEPLOYABLE = Quantization(4, 5)
SIMULATED = Quantization(3, 3, activation_granularity=ActivationGranularity.PER_SAMPLE_CHANNEL)
MOVING = Quantization(
    3,
    3,
    activation_granularity=ActivationGranularity.PER_TENSOR,
    weight_granularity=WeightGranularity.PER_KERNEL,
)
LAYERS = ["stem.0", "body.0", "body.3", "down.0", "project.0", "fc"]


def images(count: int = 40) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def pair(quantization: Quantization, network: nn.Module | None = None) -> tuple[fx.GraphModule, fx.GraphModule]:
    model = remember(captured(network or Residual(), SHAPE), images())
    student = build_student(model, quantization)
    if quantization.deployable:
        calibrate(student, images())
    else:
        simulated_logits(student, images())
    return no_grad_copy(model), student


def nothing() -> None:
    """Do nothing for each batch."""


def decibel(wanted: Tensor, found: Tensor) -> float:
    wanted, found = wanted.double(), found.double()
    return 10 * math.log10(float(wanted.square().sum() / (found - wanted).square().sum()))


@pytest.mark.parametrize("quantization", [DEPLOYABLE, SIMULATED], ids=["deployable", "simulated"])
def test_ratios_equal_a_direct_computation(quantization: Quantization) -> None:
    teacher, student = pair(quantization)
    found = diagnostics.measure(teacher, student, images(), nothing)
    assert list(found) == LAYERS
    with torch.no_grad():
        wanted, got = teacher(images()), student(images())
        assert found["fc"]["sqnr_db"] == pytest.approx(decibel(wanted, got), abs=1e-4)
        # A layer in front of which nothing is quantized but the image: its BatchNorm's output.
        stem = teacher.get_submodule("stem.1")(teacher.get_submodule("stem.0")(images()))
        if quantization.deployable:
            codes = dict(student.named_modules())
            quantizer = next(module for name, module in codes.items() if name.startswith("codes_"))
            quantized = student.get_submodule("stem.0")(quantizer(images()))
        else:
            quantized = student.get_submodule("stem.1")(student.get_submodule("stem.0")(images()))
    assert found["stem.0"]["sqnr_db"] == pytest.approx(decibel(stem, quantized), abs=1e-4)


@pytest.mark.parametrize("network", [Residual, Bottleneck])
@pytest.mark.parametrize("granularity", [ActivationGranularity.PER_CHANNEL, ActivationGranularity.PER_SAMPLE_CHANNEL])
def test_layers_are_compared_at_the_same_place(network: type[nn.Module], granularity: ActivationGranularity) -> None:
    """With 8 bits there is little noise; a comparison of different tensors would show nothing else."""
    teacher, student = pair(Quantization(8, 8, activation_granularity=granularity), network())
    for name, figures in diagnostics.measure(teacher, student, images(), nothing).items():
        assert figures["sqnr_db"] > 25, name


def test_batches_and_the_limit_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = pair(DEPLOYABLE)
    many = torch.cat([images(64), torch.full((5, *SHAPE), 1e3)])
    whole = diagnostics.measure(teacher, student, many, nothing)
    monkeypatch.setattr(diagnostics, "ELEMENTS", 5 * 192)
    calls: list[int] = []
    parts = diagnostics.measure(teacher, student, many, lambda: calls.append(1))
    assert len(calls) == 13
    for name, figures in whole.items():
        assert parts[name]["sqnr_db"] == pytest.approx(figures["sqnr_db"], abs=1e-3)


@pytest.mark.parametrize("quantization", [DEPLOYABLE, SIMULATED, MOVING], ids=["deployable", "simulated", "moving"])
def test_measuring_leaves_everything_as_it_is(quantization: Quantization) -> None:
    teacher, student = pair(quantization)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    diagnostics.measure(teacher, student, 100 * images(), nothing)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name
    for module in [*student.modules(), *teacher.modules()]:
        assert not module._forward_hooks
        assert not isinstance(module, DynamicActivation) or module.tracking


def test_a_perfect_and_a_silent_layer_have_no_ratio() -> None:
    assert diagnostics._decibel(0.0, 1.0) is None
    assert diagnostics._decibel(1.0, 0.0) is None
    assert diagnostics._decibel(100.0, 1.0) == pytest.approx(20)


def trained(quantization: Quantization, epochs: int = 2, generator: bool = False) -> dict[str, Any]:
    teacher, student = pair(quantization)
    with torch.no_grad():
        batch = Batch(images(), torch.zeros(40, dtype=torch.int64), teacher(images()))
    training = Training(co_train=False, epochs=epochs, iterations_per_epoch=6, batch_size=8, learning_rate=0.01)
    trainer = Trainer(student, training, GeneratorLosses(), ReplaySource(batch, 8, 0, torch.device("cpu")))
    before = diagnostics.measure(teacher, student, images(), nothing)
    list(trainer.run(lambda progress: None))
    after = diagnostics.measure(teacher, student, images(), nothing)
    return diagnostics.summary(trainer, 40, before, after, generator)


def test_the_file_says_formats_ranges_and_losses() -> None:
    found = json.loads(diagnostics.to_json(trained(DEPLOYABLE)))
    assert (found["format"], found["version"], found["images"]) == ("granq-diagnostics", 1, 40)
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert list(layers) == LAYERS
    stem, fc = layers["stem.0"], layers["fc"]
    assert (stem["weight_bits"], stem["activation_bits"], stem["activation_codes"]) == (4, 8, [-128, 127])
    assert (fc["activation_bits"], fc["activation_signed"], fc["activation_codes"]) == (5, False, [0, 31])
    for when in ("before", "after"):
        scale = fc[when]["input_scale"]
        assert 0 < scale["min"] <= scale["median"] <= scale["max"]
        assert fc[when]["weight_step"]["min"] > 0
    assert fc["before"] != fc["after"]
    curve = found["curve"]
    assert (curve["iteration"], curve["loss_generator"], curve["warmup_iterations"]) == (list(range(1, 13)), None, 0)
    assert curve["rate"][0] == 0.01
    assert curve["rate"] == sorted(curve["rate"], reverse=True)
    assert all(loss >= 0 for loss in curve["loss_student"])


def test_a_simulated_layer_has_no_scales_of_its_input() -> None:
    layers = {layer["name"]: layer for layer in trained(SIMULATED)["layers"]}
    assert (layers["stem.0"]["activation_bits"], layers["body.0"]["activation_bits"]) == (None, 3)
    assert layers["body.0"]["after"]["input_scale"] is None
    assert layers["body.0"]["after"]["weight_step"]["max"] > 0


@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("generator", [False, True])
def test_the_picture_has_a_panel_for_all_that_there_is(epochs: int, generator: bool) -> None:
    found = trained(DEPLOYABLE, epochs, generator)
    image = Image.open(io.BytesIO(picture.draw(found)))
    panels = 1 + (1 + generator if epochs else 0)
    assert (image.format, image.size) == ("PNG", (picture.WIDTH, picture.PANEL * panels))
    colours = {colour for _, colour in image.getcolors(1 << 20) or []}
    assert picture.BLUE in colours
    assert (picture.ORANGE in colours) == (generator and epochs > 0)


def test_the_picture_bears_figures_that_are_missing() -> None:
    found = trained(DEPLOYABLE)
    for layer in found["layers"]:
        layer["before"] = None
        layer["after"]["sqnr_db"] = None
    found["curve"]["loss_student"] = [0.0] * len(found["curve"]["loss_student"])
    assert Image.open(io.BytesIO(picture.draw(found))).size == (picture.WIDTH, 2 * picture.PANEL)
