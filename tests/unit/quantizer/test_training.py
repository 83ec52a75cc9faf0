import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from services.common.errors import InvalidArgumentError
from services.quantizer.batches import Batch, ReplaySource
from services.quantizer.calibrate import best_step, calibrate
from services.quantizer.config import ActivationGranularity, GeneratorLosses, Quantization, Training, WeightGranularity
from services.quantizer.fake_quant import DynamicActivation
from services.quantizer.flat_areas import FlatAreas
from services.quantizer.grids import WeightGrid
from services.quantizer.learned import ActivationQuantizer, QuantizedLayer
from services.quantizer.losses import generator_loss, student_loss
from services.quantizer.optimizers import ADAM_BETA2, EPSILON, SCALE_CODES
from services.quantizer.student import build_student
from services.quantizer.training import Trainer
from tests.support.models import Residual, captured

torch.set_num_threads(1)
SHAPE = (3, 8, 8)


def batch(count: int = 24, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    model = captured(Residual(), SHAPE)
    images = torch.randn(count, *SHAPE, generator=rng)
    with torch.no_grad():
        logits = model(images)
    return Batch(images, torch.randint(0, 10, (count,), generator=rng), logits)


def student_of(quantization: Quantization) -> fx.GraphModule:
    student = build_student(captured(Residual(), SHAPE), quantization)
    if quantization.deployable:
        calibrate(student, batch().images)
    return student


class Recorder(ReplaySource):
    """A replay that also wants the generator's gradients and keeps them."""

    wants_gradients = True

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.answers: list[tuple[Tensor, Tensor]] = []

    def answer(self, iteration: int, images: Tensor, logits: Tensor) -> None:
        self.answers.append((images, logits))


QUANTIZATIONS = [
    Quantization(4, 4),
    Quantization(
        3,
        3,
        activation_granularity=ActivationGranularity.PER_SAMPLE_CHANNEL,
        weight_granularity=WeightGranularity.PER_KERNEL,
    ),
]


class Reference:
    """The optimizer that training should use, from PyTorch's own: of p, or of z where p = p₀ + unit·z."""

    def __init__(self, student: nn.Module, *, deployable: bool) -> None:
        self.parameters = dict(student.named_parameters())
        self.units: dict[str, Tensor] = {}
        if not deployable:
            plain = [*self.parameters.values()]
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(plain, 0.01, momentum=0.9, nesterov=True)
            self.rates = [0.01]
            return
        for name, module in student.named_modules():
            if isinstance(module, ActivationQuantizer):
                self.units[f"{name}.log_scale"] = torch.tensor(1 / max(15, module.code_range.hi))
            elif isinstance(module, QuantizedLayer):
                size, size_of_bias = (float(p.detach().square().mean().sqrt()) for p in (module.weight, module.bias))
                codes = 2.5 * module.log_step.detach().exp()
                in_weights = (codes.view(-1, *[1] * (module.weight.dim() - 1)) / module.input_scale()).detach()
                self.units[f"{name}.weight"] = in_weights.clamp(max=size)
                half_range = module.quantizer.code_range.hi / 2
                self.units[f"{name}.bias"] = (codes * half_range).clamp(max=size_of_bias or size)
                self.units[f"{name}.log_step"] = torch.tensor(1 / max(15, module.grid.limit))
        assert self.units.keys() == self.parameters.keys()
        self.first = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.moved = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        groups = [{"params": [z]} for z in self.moved.values()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, ADAM_BETA2), eps=EPSILON)
        self.rates = [SCALE_CODES if name.endswith(("log_scale", "log_step")) else 0.01 for name in self.moved]

    def step(self, loss: Tensor, factor: float) -> None:
        """Follow the gradient of a loss at ``factor`` times the rates."""
        gradients = torch.autograd.grad(loss, [*self.parameters.values()])
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate
        for (name, p), gradient in zip(self.parameters.items(), gradients, strict=True):
            if self.units:
                self.moved[name].grad = gradient * self.units[name]
            else:
                p.grad = gradient
        self.optimizer.step()
        for name, unit in self.units.items():
            self.parameters[name].data = self.first[name] + unit * self.moved[name]


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=["deployable", "simulated"])
def test_an_iteration_equals_the_published_sequence(quantization: Quantization) -> None:
    """One run of the student gives what two runs, one for each loss, give."""
    training = Training(
        co_train=True,
        epochs=2,
        iterations_per_epoch=2,
        warmup_epochs=1,
        batch_size=8,
        learning_rate=0.01,
        weight_decay=0.0,
    )
    losses = GeneratorLosses()
    student = student_of(quantization)
    twin = copy.deepcopy(student)
    source = Recorder(batch(), 8, 0, torch.device("cpu"))
    trainer = Trainer(student, training, losses, source)
    parameters = dict(twin.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_()
    reference = Reference(twin, deployable=quantization.deployable)
    plain = ReplaySource(batch(), 8, 0, torch.device("cpu"))
    for iteration in range(4):
        trainer.step()
        data = plain.next(iteration)
        images, teacher = data.images.requires_grad_(), data.logits.clone().requires_grad_()
        want = torch.autograd.grad(generator_loss(teacher, twin(images), data.labels, losses), (images, teacher))
        for got, expected in zip(source.answers[-1], want, strict=True):
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-8)
        if iteration >= 2:
            factor = 0.5 * (1 + math.cos(math.pi * (iteration - 2) / 2))
            reference.step(student_loss(data.logits, twin(images.detach()), 20.0), factor)
        for name, value in student.named_parameters():
            assert torch.allclose(value, parameters[name], rtol=1e-5, atol=1e-7), (iteration, name)


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=["deployable", "simulated"])
def test_resume_is_bit_equal(quantization: Quantization) -> None:
    training = Training(co_train=False, epochs=2, iterations_per_epoch=5, batch_size=8, learning_rate=0.01)

    def trainer() -> Trainer:
        source = ReplaySource(batch(), 8, 3, torch.device("cpu"))
        return Trainer(student_of(quantization), training, GeneratorLosses(), source)

    whole = trainer()
    states: dict[int, dict[str, Tensor]] = {}
    for iteration in whole.run(lambda progress: None):
        states[iteration] = {name: value.clone() for name, value in whole.state().items()}
    resumed = trainer()
    resumed.load_state(states[4], 4)
    assert list(resumed.run(lambda progress: None)) == [5, 6, 7, 8, 9, 10]
    final = resumed.state()
    assert final.keys() == states[10].keys()
    for name, value in final.items():
        assert torch.equal(value, states[10][name]), name


def test_flat_areas_are_asked_of_the_teacher() -> None:
    """The student's target on an image with flat areas is what the teacher says of that image."""
    teacher = captured(Residual(), SHAPE)
    training = Training(co_train=False, epochs=1, iterations_per_epoch=1, batch_size=8, learning_rate=0.01)
    training = training.for_family(QUANTIZATIONS[0])
    flat = FlatAreas(-torch.ones(3), torch.ones(3), seed=4)
    source = ReplaySource(batch(), 8, 0, torch.device("cpu"))
    trainer = Trainer(student_of(QUANTIZATIONS[0]), training, GeneratorLosses(), source, teacher, flat)
    twin = copy.deepcopy(trainer.student)
    images = flat(ReplaySource(batch(), 8, 0, torch.device("cpu")).next(0).images, 0)
    with torch.no_grad():
        wanted = student_loss(teacher(images), twin(images), training.temperature)
    least = -(training.temperature**2) * math.log(10)
    assert torch.allclose(trainer.step()[0], wanted - least, rtol=1e-4)
    with pytest.raises(ValueError, match="need a teacher"):
        Trainer(twin, training, GeneratorLosses(), source, None, flat)
    with pytest.raises(ValueError, match="no gradients"):
        Trainer(twin, training, GeneratorLosses(), Recorder(batch(), 8, 0, torch.device("cpu")), teacher, flat)


def test_training_lowers_the_loss_and_leaves_batch_norm_statistics() -> None:
    quantization = QUANTIZATIONS[1]
    student = student_of(quantization)
    before = {name: value.clone() for name, value in student.named_buffers() if "running" in name}
    assert before
    training = Training(co_train=False, epochs=4, iterations_per_epoch=10, batch_size=12, learning_rate=0.01)
    trainer = Trainer(student, training, GeneratorLosses(), ReplaySource(batch(), 12, 0, torch.device("cpu")))
    losses = [float(trainer.step()[0]) for _ in range(training.iterations)]
    assert sum(losses[-5:]) < sum(losses[:5])
    for name, value in student.named_buffers():
        if name in before:
            assert torch.equal(value, before[name])


def test_every_image_comes_once_a_pass_and_the_order_follows_from_the_seed() -> None:
    data = batch(24)
    indexed = Batch(torch.arange(24.0).view(24, 1, 1, 1).expand(24, *SHAPE).contiguous(), data.labels, data.logits)
    source = ReplaySource(indexed, 8, 5, torch.device("cpu"))
    passes = [[int(v) for i in range(3) for v in source.next(3 * p + i).images[:, 0, 0, 0]] for p in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(24))
    assert passes[0] != passes[1]
    again = ReplaySource(indexed, 8, 5, torch.device("cpu"))
    assert [int(v) for v in again.next(4).images[:, 0, 0, 0]] == passes[1][8:16]


@pytest.mark.parametrize("bits", [2, 4])
def test_the_best_step_is_near_the_optimum_of_a_fine_search(bits: int) -> None:
    values = torch.randn(5, 4000, generator=torch.Generator().manual_seed(0))
    grid = WeightGrid.of(bits)
    got = best_step(values, grid)

    def error(step: Tensor) -> Tensor:
        s = step.view(-1, 1)
        return (grid.nearest(values / s) * s - values).square().mean(1)

    largest = values.abs().amax(1) / grid.limit
    fine = torch.stack([error(largest * r) for r in torch.linspace(0.1, 1, 400).tolist()]).amin(0)
    assert (error(got) <= fine * 1.02).all()
    assert best_step(torch.zeros(2, 10), grid).tolist() == [0, 0]


def test_a_comparison_may_quantize_every_input_or_leave_channel_ranges_unfolded() -> None:
    published = build_student(captured(Residual(), SHAPE), QUANTIZATIONS[1])
    everything = build_student(captured(Residual(), SHAPE), replace(QUANTIZATIONS[1], every_input=True))
    static = Quantization(4, 4, fold=False, every_input=True)
    assert not static.deployable
    unfolded = build_student(captured(Residual(), SHAPE), static)

    def inputs(student: fx.GraphModule) -> int:
        return sum(isinstance(module, DynamicActivation) for module in student.modules())

    # The outputs of four ReLUs; beside them the image and the pooled features.
    assert (inputs(published), inputs(everything), inputs(unfolded)) == (4, 6, 6)
    float_logits = captured(Residual(), SHAPE)(batch().images)
    error = (unfolded(batch().images) - float_logits).square().mean() / float_logits.square().mean()
    assert 0 < error.item() < 0.3


def test_configuration_is_refused_with_the_field() -> None:
    from granq.v1 import common_pb2

    with pytest.raises(InvalidArgumentError) as caught:
        Training.from_proto(common_pb2.TrainingConfig(epochs=2, warmup_epochs=2)).for_family(QUANTIZATIONS[1])
    assert caught.value.field == "training.warmup_epochs"
    replay = Training.from_proto(common_pb2.TrainingConfig(epochs=2, warmup_epochs=2)).for_family(QUANTIZATIONS[0])
    assert (replay.co_train, replay.warmup_iterations) == (False, 0)
    with pytest.raises(InvalidArgumentError) as caught:
        build_student(captured(Residual(), SHAPE), Quantization(4, 4, overrides={"nope": (8, 8)}))
    assert caught.value.field == "quantization.overrides[0].layer"
    assert "stem.0" in caught.value.message
    again = Quantization.from_json(Quantization(4, 5, overrides={"fc": (None, 8)}).to_json())
    assert again == Quantization(4, 5, overrides={"fc": (None, 8)})
    assert isinstance(student_of(again), nn.Module)
