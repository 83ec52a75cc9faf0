"""Two ranks, in processes of their own, train what one does."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from granq.v1 import common_pb2, jobs_pb2, quantizer_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from services.common.jobs import JobContext
from services.common.logs import get_logger
from services.common.models.cifar_resnet import CifarResNet
from services.common.models.loading import load_model
from services.quantizer.batches import Batch, ReplaySource
from services.quantizer.calibrate import calibrate
from services.quantizer.config import GeneratorLosses, Quantization, Training
from services.quantizer.rank_process import device_of, further_ranks
from services.quantizer.settings import QuantizerSettings
from services.quantizer.student import build_student, no_grad_copy
from services.quantizer.training import Trainer
from tests.support.models import settle

torch.set_num_threads(1)
CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
BATCH = 9  # parts of 4 and 5 images
DEPLOYABLE = common_pb2.QuantizationConfig(weight_bits=4, activation_bits=4)
PER_TENSOR = common_pb2.QuantizationConfig(
    weight_bits=4, activation_bits=4, activation_granularity=common_pb2.ACTIVATION_GRANULARITY_PER_TENSOR
)


class Answered(ReplaySource):
    """A replay that wants the gradients of a generator and keeps them."""

    def __init__(self, batch: Batch, wants_gradients: bool) -> None:
        super().__init__(batch, BATCH, 0, CPU)
        self.wants_gradients = wants_gradients
        self.answers: list[tuple[Tensor, Tensor]] = []

    def answer(self, iteration: int, images: Tensor, logits: Tensor) -> None:
        self.answers.append((images, logits))


@dataclass
class Bench:
    """A tiny model in a store, and images for it."""

    folder: Path
    store: ArtifactStore
    model: common_pb2.ModelSource
    images: Batch
    made: list[Answered] = field(default_factory=list)

    def context(self, ranks: int) -> JobContext:
        settings = QuantizerSettings(artifact_url=(self.folder / "artifacts").as_uri(), ranks=ranks, device="cpu")
        log = get_logger("test")
        return JobContext("job", "pipeline", self.store, settings, log, lambda progress: None, threading.Event())

    def request(
        self, quantization: common_pb2.QuantizationConfig, **training: object
    ) -> quantizer_pb2.StartQuantizeRequest:
        joint = quantization is not DEPLOYABLE
        mode = common_pb2.TRAINING_MODE_CO_TRAIN if joint else common_pb2.TRAINING_MODE_REPLAY
        values = {"mode": mode, "batch_size": BATCH, "epochs": 3, "iterations_per_epoch": 1, **training}
        return quantizer_pb2.StartQuantizeRequest(
            key=jobs_pb2.JobKey(job_id="job"),
            model=self.model,
            quantization=quantization,
            training=common_pb2.TrainingConfig(warmup_epochs=int(joint), **values),  # type: ignore[arg-type]
        )

    def trainer(self, request: quantizer_pb2.StartQuantizeRequest) -> Trainer:
        quantization = Quantization.from_proto(request.quantization)
        training = Training.from_proto(request.training).for_family(quantization)
        model = load_model(self.model, self.store)
        student = build_student(model.module, quantization, model.pixel_range)
        if quantization.deployable:
            calibrate(student, self.images.images)
        teacher = no_grad_copy(model.module) if training.feature_weight else None
        source = Answered(self.images, bool(training.co_train))
        self.made.append(source)
        return Trainer(student, training, GeneratorLosses(), source, teacher)

    def losses(self, trainer: Trainer, request: quantizer_pb2.StartQuantizeRequest, ranks: int) -> Tensor:
        with further_ranks(trainer, request, self.context(ranks), CPU):
            return torch.stack([torch.stack(trainer.step()) for _ in range(trainer.training.iterations)])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("ranks")
    store = ArtifactStore((folder / "artifacts").as_uri())
    weights = folder / "tiny.safetensors"
    save_file(settle(CifarResNet(3, 10, 1)).state_dict(), weights)
    model = common_pb2.ModelSource(artifact=store.put_file(weights), architecture="resnet20", input_shape=SHAPE)
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(4 * BATCH, *SHAPE, generator=rng)
    with torch.no_grad():
        logits = load_model(model, store).module(images)
    return Bench(folder, store, model, Batch(images, torch.randint(0, 10, (4 * BATCH,), generator=rng), logits))


@pytest.mark.parametrize("quantization", [DEPLOYABLE, PER_TENSOR], ids=["deployable", "simulated"])
def test_two_ranks_follow_the_loss_curve_of_one(bench: Bench, quantization: common_pb2.QuantizationConfig) -> None:
    request = bench.request(quantization, learning_rate=1e-4)
    alone, together = bench.trainer(request), bench.trainer(request)
    begin = {name: value.clone() for name, value in alone.student.state_dict().items()}
    want, got = bench.losses(alone, request, 1), bench.losses(together, request, 2)
    # Sums over a batch are taken in another order, which shows in the last digits. Few small steps, since a last bit
    # that moves a value across a rounding boundary grows with every step, here as between two orders of one batch.
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4), (got, want)
    for mine, others in zip(bench.made[-1].answers, bench.made[-2].answers, strict=True):
        for a, b in zip(mine, others, strict=True):
            assert a.shape == b.shape
            assert (a - b).norm() <= 0.02 * b.norm() + 1e-7
    # A part of the batch that is missing, or of the wrong weight, makes steps of another direction.
    end, other = alone.student.state_dict(), together.student.state_dict()
    moved = torch.cat([(end[name] - value).flatten().double() for name, value in begin.items()])
    apart = torch.cat([(end[name] - other[name]).flatten().double() for name in begin])
    assert moved.norm() > 0
    assert apart.norm() <= 0.1 * moved.norm(), (apart.norm(), moved.norm())


def further() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "services.quantizer.rank_process" in child.cmdline()]


def test_a_killed_rank_fails_the_training_and_is_named(bench: Bench) -> None:
    request = bench.request(DEPLOYABLE, iterations_per_epoch=1000)
    trainer = bench.trainer(request)

    def train() -> None:
        with further_ranks(trainer, request, bench.context(3), CPU):
            trainer.step()
            further()[-1].kill()
            while trainer.iteration < trainer.training.iterations:
                trainer.step()

    with pytest.raises(UnavailableError, match=r"rank 2 of 3 was ended by SIGKILL; start the job again") as caught:
        train()
    assert caught.value.reason == "RANK_DIED"
    assert 0 < trainer.iteration < trainer.training.iterations
    assert not further()


@pytest.mark.parametrize(
    ("refused", "error", "match"),
    [
        (lambda: device_of(0, 4, torch.device("cuda", 1)), FailedPreconditionError, "4 ranks need as many GPUs"),
        (lambda: device_of(0, 4, torch.device("cuda")), FailedPreconditionError, "lower ranks"),
    ],
)
def test_ranks_need_a_gpu_each(refused: Callable[[], object], error: type[Exception], match: str) -> None:
    if torch.cuda.device_count() >= 4:
        pytest.skip("this machine has four GPUs")
    with pytest.raises(error, match=match):
        refused()


def test_each_rank_needs_an_image(bench: Bench) -> None:
    request = bench.request(DEPLOYABLE, batch_size=2)
    with pytest.raises(InvalidArgumentError, match="raise batch_size") as caught:
        bench.losses(bench.trainer(request), request, 3)
    assert caught.value.field == "training.batch_size"
