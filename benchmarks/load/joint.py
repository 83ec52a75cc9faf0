"""Joint training in one process against the same training through a real generator server."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from granq.v1 import common_pb2, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.models import LoadedModel, load_model
from services.common.models.cifar_resnet import resnet20
from services.common.security import SecuritySettings
from services.generator.synthesis import SynthesisParameters, Synthesizer
from services.quantizer.batches import Batch, BatchSource
from services.quantizer.config import ActivationGranularity, GeneratorLosses, Quantization, Training
from services.quantizer.generator_client import CoTrainSource, opening
from services.quantizer.student import build_student
from services.quantizer.training import Trainer
from tests.support.models import settle
from tests.support.servers import ServerProcess

_QUIET_SECONDS = 0.2


@dataclass(frozen=True)
class Case:
    """What is trained: a network, the side of its square images, and images in a batch."""

    network: str
    side: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read "resnet20@32x16": network, side, batch."""
        network, _, rest = text.partition("@")
        side, _, batch = rest.partition("x")
        return cls(network, int(side), int(batch))

    def __str__(self) -> str:
        return f"{self.network}, {self.side} px, batch {self.batch}"


@dataclass
class Arm:
    """One way of training and what was measured of it, in seconds."""

    trainer: Trainer
    source: "Stamped"
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def run(self, iterations: int, cpu_seconds: Callable[[], float]) -> None:
        """Train; what counts is from the arrival of one batch to that of the last, so that overlap counts, too."""
        self.trainer.step()
        self.source.begin()
        before = cpu_seconds()
        for _ in range(iterations):
            self.trainer.step()
        # The step above still belongs to the last batch; both arms leave it out alike.
        self.walls += self.source.intervals()
        self.waits += self.source.waits
        self.cpus.append((cpu_seconds() - before) / iterations)


class Stamped:
    """A batch source that notes when each batch was asked for, and when it was there."""

    wants_gradients = True

    def __init__(self, source: BatchSource) -> None:
        self._source = source
        self._arrivals: list[float] = []
        self.waits: list[float] = []

    def begin(self) -> None:
        """Forget what was noted."""
        self._arrivals, self.waits = [], []

    def intervals(self) -> list[float]:
        """Return the times between arrivals, one for each iteration."""
        return [later - earlier for earlier, later in zip(self._arrivals, self._arrivals[1:], strict=False)]

    def next(self, iteration: int) -> Batch:
        """Return the batch of ``iteration``."""
        began = time.perf_counter()
        batch = self._source.next(iteration)
        self._arrivals.append(time.perf_counter())
        self.waits.append(self._arrivals[-1] - began)
        return batch

    def answer(self, iteration: int, images: Tensor, logits: Tensor) -> None:
        """Pass the gradients on."""
        self._source.answer(iteration, images, logits)

    def save(self) -> str:
        """Return the source's state."""
        return self._source.save()

    def close(self) -> None:
        """Release the source."""
        self._source.close()


class InProcess:
    """A generator in the student's own process: what a program that is no service would do."""

    wants_gradients = True

    def __init__(self, model: LoadedModel, batch: int) -> None:
        parameters = SynthesisParameters(batch_size=batch)
        self._synthesizer = Synthesizer(
            model.module, model.input_shape, model.num_classes, parameters, torch.device("cpu"), model.pixel_range
        )

    def next(self, _iteration: int) -> Batch:
        """Draw a batch."""
        drawn = self._synthesizer.draw()
        return Batch(drawn.images, drawn.labels, drawn.logits)

    def answer(self, _iteration: int, images: Tensor, logits: Tensor) -> None:
        """Step the generator."""
        self._synthesizer.step(images, logits)

    def save(self) -> str:
        """Return nothing: this source is not resumed."""
        return ""

    def close(self) -> None:
        """Hold nothing."""


def _network(name: str) -> nn.Module:
    return resnet20() if name == "resnet20" else torchvision.models.get_model(name)


def _trainer(model: LoadedModel, case: Case, source: BatchSource) -> Trainer:
    quantization = Quantization(4, 4, activation_granularity=ActivationGranularity.PER_SAMPLE_CHANNEL)
    training = Training(warmup_epochs=0, batch_size=case.batch, epochs=100).for_family(quantization)
    return Trainer(build_student(model.module, quantization), training, GeneratorLosses(), source)


@contextmanager
def arms(case: Case, threads: int) -> Iterator[tuple[Arm, Arm, Callable[[], float]]]:
    """Give both arms, and what tells the CPU seconds of this process, the server and the stream's process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with TemporaryDirectory() as name:
        folder = Path(name)
        store = ArtifactStore((folder / "artifacts").as_uri())
        network = settle(_network(case.network))
        save_file({key: value.float().contiguous() for key, value in network.state_dict().items()}, folder / "weights")
        source = common_pb2.ModelSource(
            artifact=store.put_file(folder / "weights"),
            architecture=case.network,
            input_shape=(3, case.side, case.side),
        )
        server = ServerProcess("generator", folder, torch_threads=str(threads)).start()
        try:
            local = Stamped(InProcess(load_model(source, store), case.batch))
            key = jobs_pb2.JobKey(job_id="benchmark", pipeline_id="benchmark")
            message = opening(source, common_pb2.GeneratorConfig(), case.batch, 0, key)
            with closing(
                Stamped(CoTrainSource(server.address, SecuritySettings(), message, torch.device("cpu")))
            ) as remote:
                processes = [psutil.Process(), psutil.Process(server.pid)]
                pair = [Arm(_trainer(load_model(source, store), case, way), way) for way in (local, remote)]
                for arm in pair:
                    for _ in range(3):
                        arm.trainer.step()
                processes += server.children()
                yield pair[0], pair[1], lambda: sum(sum(process.cpu_times()[:2]) for process in processes)
        finally:
            server.stop()


def settle_down(cpu_seconds: Callable[[], float]) -> None:
    """Wait until the generator has drawn what it draws ahead, so that it takes nothing from the other arm."""
    before = -1.0
    while (now := cpu_seconds()) > before + 0.5 * _QUIET_SECONDS:
        before = now
        time.sleep(_QUIET_SECONDS)


def measure(case: Case, threads: int, cores: int, iterations: int, rounds: int) -> list[str]:
    """Return a row of the table."""
    available = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(available)[:cores])
    try:
        with arms(case, threads) as (local, remote, cpu_seconds):
            for turn in range(rounds):
                for arm in (local, remote) if turn % 2 == 0 else (remote, local):
                    settle_down(cpu_seconds)
                    arm.run(iterations, cpu_seconds)
    finally:
        os.sched_setaffinity(0, available)
    image_bytes = 4 * 3 * case.side**2 * case.batch
    wall = [statistics.median(arm.walls) for arm in (local, remote)]
    cpu = [min(arm.cpus) for arm in (local, remote)]
    return [
        str(case),
        str(cores),
        f"{2 * image_bytes / 1e6:.2f}",
        *(f"{1e3 * statistics.median(arm.walls):.1f} ({1e3 * min(arm.walls):.1f})" for arm in (local, remote)),
        f"{wall[1] / wall[0]:.2f}",
        f"{min(remote.walls) / min(local.walls):.2f}",
        f"{1e3 * cpu[0]:.1f}",
        f"{1e3 * cpu[1]:.1f}",
        f"{cpu[1] / cpu[0]:.2f}",
        f"{1e3 * statistics.median(remote.waits):.1f}",
    ]


COLUMNS = (
    "training",
    "cores",
    "MB of tensors, both ways",
    "one process, ms",
    "service, ms",
    "ratio of medians",
    "of minima",
    "CPU ms, one process",
    "CPU ms, service",
    "ratio of CPU",
    "wait for a batch, ms",
)
