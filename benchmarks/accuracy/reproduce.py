"""The published method, simulated: joint training at batch 16, dynamic ranges, ReLU outputs only, last epoch counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.bench import Bench, JointSource
from benchmarks.results_table import Table, spread
from services.quantizer.config import ActivationGranularity, Quantization, Training, WeightGranularity

WARMUP_EPOCHS = 4


@dataclass(frozen=True)
class Setting:
    """One row: bits, granularities, and the number of epochs, warm-up included."""

    bits: int
    activation: ActivationGranularity
    weight: WeightGranularity
    epochs: int


_GRANQ, _LAYER = ActivationGranularity.PER_SAMPLE_CHANNEL, ActivationGranularity.PER_TENSOR
_KERNEL, _OUTPUT = WeightGranularity.PER_KERNEL, WeightGranularity.PER_OUTPUT_CHANNEL
SETTINGS = (
    Setting(4, _GRANQ, _OUTPUT, 6),
    Setting(4, _GRANQ, _KERNEL, 10),
    Setting(3, _GRANQ, _OUTPUT, 12),
    Setting(3, _GRANQ, _KERNEL, 16),
    Setting(4, _LAYER, _OUTPUT, 6),
    Setting(3, _LAYER, _OUTPUT, 9),
)
"""Settings for which figures of the authors' functions exist to compare with."""


def reproduce(bench: Bench, settings: Sequence[Setting], seeds: Sequence[int], out: Path | None) -> None:
    """Print and write the table."""
    notes = [
        f"Simulated family; no engine runs this. Full precision: {bench.top1(bench.teacher_logits):.2f} % top-1 of "
        f"{len(bench.labels)} images. Joint training, batch 16, 200 iterations an epoch, the first {WARMUP_EPOCHS} "
        "epochs for the generator alone, SGD 1e-4 (Nesterov 0.9, weight decay 1e-4, no decay of the rate), τ 20.",
        "Weights PER_KERNEL have a range for each kernel slice, which no integer kernel can run: for comparison only.",
        f"Before: ranges from 512 images of the untrained generator. Median (least–most) of seeds "
        f"{', '.join(map(str, seeds))}; the last epoch counts.",
    ]
    columns = ["W/A", "activations", "weights", "epochs", "before QAT", "after QAT", "minutes a run"]
    table = Table(out, "The published method, reproduced (simulated)", columns, notes)
    for setting in settings:
        quantization = Quantization(
            setting.bits,
            setting.bits,
            activation_granularity=setting.activation,
            weight_granularity=setting.weight,
        )
        before, after, seconds = [], [], []
        for seed in seeds:
            training = Training(
                epochs=setting.epochs,
                warmup_epochs=WARMUP_EPOCHS,
                batch_size=16,
                learning_rate=1e-4,
                cosine=False,
                milestones=(100, 200, 300),
                seed=seed,
            )
            synthesizer = bench.synthesizer(16, seed, bounded=False)
            first = bench.synthesize(0, 512, 16, seed, bounded=False, refined=0).images
            student = bench.student(quantization, first)
            before.append(bench.top1(bench.simulated(student)))
            seconds.append(bench.train(student, quantization, training, JointSource(synthesizer)))
            after.append(bench.top1(bench.simulated(student)))
        table.add(
            f"{setting.bits}/{setting.bits}",
            setting.activation.name,
            setting.weight.name,
            setting.epochs,
            spread(before),
            spread(after),
            f"{sorted(seconds)[len(seconds) // 2] / 60:.1f}",
        )
