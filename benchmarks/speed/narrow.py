"""What bfloat16 does to accuracy: the published training, with the layers in either number type."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.accuracy.bench import CPU, Bench, JointSource
from services.generator.synthesis import SynthesisParameters, Synthesizer
from services.quantizer.config import ActivationGranularity, GeneratorLosses, Quantization, Training
from services.quantizer.student import build_student, no_grad_copy, stop_tracking
from services.quantizer.training import Trainer

COLUMNS = ("W/A", "epochs", "seed", "top-1 before training", "float32", "bfloat16", "difference")
BATCH = 16


@dataclass(frozen=True)
class Case:
    """A training to compare: bits of weights and activations, epochs in all, and the seed."""

    bits: int
    epochs: int
    seed: int


def notes(bench: Bench) -> tuple[str, ...]:
    """Return what was run."""
    return (
        f"Full precision: {bench.top1(bench.teacher_logits):.2f} % top-1 of {len(bench.labels)} images. Simulated "
        f"students, one range per sample and channel, joint training, batch {BATCH}, 200 iterations an epoch, the "
        "first 4 for the generator alone, SGD 1e-4 (Nesterov 0.9, weight decay 1e-4, no decay of the rate), τ 20.",
        "In the column bfloat16 the layers of generator, teacher and student compute in that while the student is "
        "trained; accuracy is that of the float32 arithmetic in both.",
    )


def rows(bench: Bench, cases: list[Case]) -> Iterator[tuple[object, ...]]:
    """Yield a row for each case."""
    for case in cases:
        before, wide = _trained(bench, case, bfloat16=False)
        _, narrow = _trained(bench, case, bfloat16=True)
        figures = (f"{before:.2f}", f"{wide:.2f}", f"{narrow:.2f}", f"{narrow - wide:+.2f}")
        yield f"{case.bits}/{case.bits}", case.epochs, case.seed, *figures


def _trained(bench: Bench, case: Case, *, bfloat16: bool) -> tuple[float, float]:
    """Return top-1 before and after a training."""
    quantization = Quantization(case.bits, case.bits, activation_granularity=ActivationGranularity.PER_SAMPLE_CHANNEL)
    training = Training(
        epochs=case.epochs,
        warmup_epochs=4,
        batch_size=BATCH,
        learning_rate=1e-4,
        cosine=False,
        seed=case.seed,
    ).for_family(quantization)
    model = bench.model
    synthesizer = Synthesizer(
        no_grad_copy(model.module),
        model.input_shape,
        model.num_classes,
        SynthesisParameters(BATCH, case.seed),
        CPU,
        bfloat16=bfloat16,
    )
    student = build_student(model.module, quantization)
    before = bench.top1(bench.simulated(student))
    trainer = Trainer(student, training, GeneratorLosses(), JointSource(synthesizer), bfloat16=bfloat16)
    for _ in trainer.run(lambda progress: None):
        pass
    stop_tracking(student)
    return before, bench.top1(bench.simulated(student))
