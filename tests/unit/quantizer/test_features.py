import pytest
import torch
from torch import Tensor, nn

from services.quantizer.batches import Batch, ReplaySource
from services.quantizer.calibrate import calibrate
from services.quantizer.config import (
    FEATURE_WEIGHT,
    ActivationGranularity,
    GeneratorLosses,
    Quantization,
    Training,
)
from services.quantizer.features import LEAST_GAMMA, FeatureLoss
from services.quantizer.student import build_student, no_grad_copy
from services.quantizer.training import Trainer
from tests.support.models import Residual, captured

torch.set_num_threads(1)
SHAPE = (3, 8, 8)
DEPLOYABLE = Quantization(4, 4)
SIMULATED = Quantization(4, 4, activation_granularity=ActivationGranularity.PER_SAMPLE_CHANNEL)
NORMS = ["stem.1", "body.1", "body.4", "down.1", "project.1"]


def images(count: int = 6) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def outputs(module: nn.Module, names: list[str], x: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [module.get_submodule(n).register_forward_hook(lambda m, a, out: found.append(out)) for n in names]
    module(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("quantization", [DEPLOYABLE, SIMULATED], ids=["folded", "kept"])
def test_equals_the_definition(quantization: Quantization) -> None:
    model = captured(Residual(), SHAPE)
    gammas = {name: model.get_submodule(name).weight for name in NORMS}
    assert isinstance(gammas["body.1"], Tensor)
    gammas["body.1"].data[0] = 1e-6  # a channel that was switched off
    student = build_student(model, quantization)
    if quantization.deployable:
        calibrate(student, images())
    teacher = no_grad_copy(model)
    x = images()
    learned_names = [name.rsplit(".", 1)[0] + f".{int(name[-1]) - 1}" for name in NORMS]
    taught = outputs(teacher, NORMS, x)
    learned = outputs(student, learned_names if quantization.deployable else NORMS, x)
    terms = []
    for name, t, s in zip(NORMS, taught, learned, strict=True):
        gamma = gammas[name]
        assert isinstance(gamma, Tensor)
        total = 0.0
        for channel in range(t.shape[1]):
            deviation = max(abs(gamma[channel].item()), LEAST_GAMMA * gamma.detach().abs().mean().item())
            total += (s[:, channel] - t[:, channel]).detach().double().square().mean().item() / deviation**2
        terms.append(total / t.shape[1])
    loss = FeatureLoss(teacher, student)
    teacher(x)
    student(x)
    assert float(loss()) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_an_exact_student_has_no_loss() -> None:
    model = captured(Residual(), SHAPE)
    teacher, student = no_grad_copy(model), no_grad_copy(model)
    loss = FeatureLoss(teacher, student)
    teacher(images())
    student(images())
    assert float(loss()) == 0


def trainer(weight: float) -> Trainer:
    model = captured(Residual(), SHAPE)
    teacher = no_grad_copy(model)
    data = images(24)
    with torch.no_grad():
        batch = Batch(data, torch.zeros(24, dtype=torch.int64), teacher(data))
    student = build_student(model, DEPLOYABLE)
    calibrate(student, data)
    training = Training(
        co_train=False,
        learning_rate=5e-3,
        epochs=2,
        iterations_per_epoch=10,
        batch_size=12,
        feature_weight=weight,
    )
    return Trainer(
        student,
        training,
        GeneratorLosses(),
        ReplaySource(batch, 12, 0, torch.device("cpu")),
        teacher if weight else None,
    )


def features_of(trained: Trainer) -> float:
    teacher = no_grad_copy(captured(Residual(), SHAPE))
    loss = FeatureLoss(teacher, trained.student)
    teacher(images(24))
    trained.student(images(24))
    return float(loss())


def test_training_with_it_brings_the_features_closer_than_training_without() -> None:
    before = features_of(trainer(0))
    reached = {}
    for weight in (0.0, 3.0):
        trained = trainer(weight)
        for _ in range(20):
            trained.step()
        reached[weight] = features_of(trained)
    assert reached[3.0] < reached[0.0]
    assert reached[3.0] < before


def test_resume_is_bit_equal() -> None:
    whole, part = trainer(3.0), trainer(3.0)
    for _ in range(7):
        whole.step()
        part.step()
    state = {name: value.clone() for name, value in part.state().items()}
    resumed = trainer(3.0)
    resumed.load_state(state, 7)
    for _ in range(5):
        whole.step()
        resumed.step()
    for name, value in resumed.state().items():
        assert torch.equal(value, whole.state()[name]), name


def test_the_published_method_has_none_unless_it_is_asked_for() -> None:
    assert Training().for_family(DEPLOYABLE).feature_weight == FEATURE_WEIGHT
    assert Training().for_family(SIMULATED).feature_weight == 0
    assert Training(feature_weight=2.0).for_family(SIMULATED).feature_weight == 2
    assert Training(feature_weight=0.0).for_family(DEPLOYABLE).feature_weight == 0
