"""An iteration of joint training: the published sequence and ours, with the limit that convolutions set."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, fx, nn

from benchmarks.accuracy.bench import JointSource
from benchmarks.speed.published import PublishedIteration
from benchmarks.speed.timing import Clock, in_turn, peak_bytes
from services.common.models.capture import capture
from services.common.models.cifar_resnet import resnet20
from services.generator.synthesis import SynthesisParameters, Synthesizer
from services.quantizer.config import ActivationGranularity, GeneratorLosses, Quantization, Training
from services.quantizer.student import build_student, no_grad_copy
from services.quantizer.training import Trainer

BITS = 4
MIB = 2**20
SIZE = 512  # of the matrices whose product measures the machine's rate


@dataclass(frozen=True)
class Network:
    """A network to train, and its usual input."""

    build: Callable[[int], nn.Module]
    side: int
    classes: int


NETWORKS = {
    "resnet20": Network(resnet20, 32, 10),
    "resnet18": Network(lambda classes: torchvision.models.resnet18(num_classes=classes), 64, 1000),
}
GROWTH = [
    *(("resnet20", batch, 32) for batch in (4, 16, 64)),
    *(("resnet20", 16, side) for side in (16, 48)),
    *(("resnet18", 16, side) for side in (32, 64)),
]
COLUMNS = (
    "network, input, batch",
    "published ms",
    "ours ms",
    "published / ours",
    "convolutions of ours at the rate of a matrix product, ms",
    "ours / that",
    "peak memory published MiB",
    "ours MiB",
    "ours / published",
    "first L_S, published and ours",
)
NOTES = (
    f"Weights and activations of {BITS} bits, one range per sample and channel; the generator's step is included.",
    "Published: benchmarks/speed/published.py. Ours: the services' own classes in one process, which cannot overlap.",
    "In a row named bfloat16 our layers compute in that; the published way is float32 in every row.",
    "Both keep freed memory for what comes next, as jobs of the services do.",
    f"Matrix product: {SIZE}×{SIZE} in the number type of our layers, measured in turn with the iterations. "
    "Convolutions: multiply-adds of the teacher (2 F), the student (4 F) and the generator (3 of its passes).",
)
GROWTH_COLUMNS = ("network", "batch", "side", "ms", "ms per image", "peak memory MiB", "MiB per image")


def _settled(network: nn.Module) -> nn.Module:
    """Give BatchNorm statistics that a random network's activations roughly have."""
    torch.manual_seed(0)
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(8, 3, 32, 32))
    return network.eval()


@dataclass(frozen=True)
class _Pair:
    """Both ways to train one network. ``make_*`` return a call that does an iteration and returns L_S."""

    network: nn.Module
    captured: fx.GraphModule
    shape: tuple[int, int, int]
    classes: int
    training: Training
    device: torch.device
    bfloat16: bool = False

    @classmethod
    def of(cls, name: str, batch: int, side: int, device: torch.device, *, bfloat16: bool = False) -> "_Pair":
        spec = NETWORKS[name]
        network = _settled(spec.build(spec.classes))
        shape = (3, side, side)
        training = Training(
            co_train=True, epochs=2, iterations_per_epoch=1000, warmup_epochs=0, batch_size=batch
        ).for_family(_quantization())
        captured = capture(copy.deepcopy(network), shape)
        return cls(network, captured, shape, spec.classes, training, device, bfloat16)

    def published(self) -> Callable[[], Tensor]:
        baseline = PublishedIteration(self.network, self.shape, self.classes, BITS, self.training, self.device)
        return lambda: baseline.step()[0]

    def trainer(self) -> tuple[Trainer, Synthesizer]:
        parameters = SynthesisParameters(self.training.batch_size, self.training.seed)
        synthesizer = Synthesizer(
            *(no_grad_copy(self.captured), self.shape, self.classes, parameters, self.device), bfloat16=self.bfloat16
        )
        student = build_student(self.captured, _quantization()).to(self.device)
        source = JointSource(synthesizer)
        trainer = Trainer(student, self.training, GeneratorLosses(), source, bfloat16=self.bfloat16)
        return trainer, synthesizer

    def ours(self) -> Callable[[], Tensor]:
        trainer = self.trainer()[0]
        return lambda: trainer.step()[0]


def _quantization() -> Quantization:
    return Quantization(BITS, BITS, activation_granularity=ActivationGranularity.PER_SAMPLE_CHANNEL)


def multiply_adds(pair: _Pair) -> int:
    """Return the multiply-adds of an iteration of ours in convolutions and linear layers."""
    trainer, synthesizer = pair.trainer()
    counts = {"student": 0, "generator": 0}

    def count(part: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight = module.get_parameter("weight")
            if output.shape[2:] == torch.Size(2 * size for size in inputs[0].shape[2:]) and output.dim() == 4:
                counts[part] += inputs[0].numel() * weight.shape[0] * 16  # enlarging: see UpsampledConv2d
            else:
                counts[part] += output.numel() * weight[0].numel()

        return hook

    hooks = []
    for part, root in (("student", trainer.student), ("generator", synthesizer.generator)):
        for module in root.modules():
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if weight is not None and weight.dim() in (2, 4) and not isinstance(module, nn.Embedding):
                hooks.append(module.register_forward_hook(count(part)))
    trainer.step()
    for hook in hooks:
        hook.remove()
    return 6 * counts["student"] + 3 * counts["generator"]


def row(
    name: str, batch: int, runs: int, clock: Clock, device: torch.device, *, memory: bool, bfloat16: bool
) -> tuple[object, ...]:
    """Return the cells of a network's row; ``bfloat16`` is what ours computes in, the published way never does."""
    pair = _Pair.of(name, batch, NETWORKS[name].side, device, bfloat16=bfloat16)
    published, ours = pair.published(), pair.ours()
    least = -(pair.training.temperature**2) * torch.log(torch.tensor(float(pair.classes)))
    first = [float(published() - least), float(ours())]
    matrix = torch.randn(SIZE, SIZE, device=device).to(torch.bfloat16 if bfloat16 else torch.float32)
    calls = {"published": published, "ours": ours, "product": lambda: matrix @ matrix}
    taken = in_turn(calls, runs, clock, device)
    floor = multiply_adds(pair) / (SIZE**3 / taken["product"])
    peaks = [peak_bytes(call, device) / MIB for call in (published, ours)] if memory else []
    return (
        f"{name}, 3×{pair.shape[1]}×{pair.shape[2]}, {batch}{', bfloat16' if bfloat16 else ''}",
        f"{1e3 * taken['published']:.0f}",
        f"{1e3 * taken['ours']:.0f}",
        f"{taken['published'] / taken['ours']:.2f}",
        f"{1e3 * floor:.0f}",
        f"{taken['ours'] / floor:.2f}",
        *((f"{peaks[0]:.0f}", f"{peaks[1]:.0f}", f"{peaks[1] / peaks[0]:.2f}") if memory else ("–",) * 3),
        f"{first[0]:.3f}, {first[1]:.3f}",
    )


def growth_row(name: str, batch: int, side: int, runs: int, clock: Clock, device: torch.device) -> tuple[object, ...]:
    """Return the cells of one size."""
    call = _Pair.of(name, batch, side, device).ours()
    milliseconds = 1e3 * in_turn({"ours": call}, runs, clock, device)["ours"]
    peak = peak_bytes(call, device) / MIB
    each = (f"{milliseconds:.0f}", f"{milliseconds / batch:.1f}", f"{peak:.0f}", f"{peak / batch:.1f}")
    return name, batch, side, *each
