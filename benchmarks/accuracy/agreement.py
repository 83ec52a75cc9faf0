"""The deployable form of a model without a labelled test set: agreement with the float model on photographs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.accuracy.bench import Bench
from benchmarks.results_table import Table, spread
from granq.v1 import reports_pb2
from services.evaluator.accuracy import AccuracyMeter
from services.quantizer.batches import Batch
from services.quantizer.config import Quantization


def agreement(
    bench: Bench,
    pictures: int,
    bits: Sequence[tuple[int, int]],
    sets: Mapping[int, Batch],
    origin: str,
    iterations: int,
    batch: int,
    out: Path | None,
) -> None:
    """Print and write the table of some synthetic ``sets`` by seed, whose ``origin`` a note tells.

    The float model's classes serve as labels. ``iterations`` 0 leaves training out.
    """
    wanted = bench.teacher_logits
    classes = len(wanted.argmax(1).unique())
    confidences = wanted.softmax(1).amax(1)
    sure = confidences >= 0.5
    size = "×".join(map(str, bench.images.shape[2:]))
    notes = [
        f"Deployable family. {len(bench.images)} seeded crops of {pictures} photographs, resampled to {size}. No "
        f"labels: the float model sees {classes} of {wanted.shape[1]} classes in them, with a mean "
        f"confidence of {100 * float(confidences.mean()):.1f} %; in {int(sure.sum())} crops it is sure: 50 % and more.",
        "Agreement: how often the exported file (`trt`, run by ONNX Runtime with optimizations off) chooses the float "
        "model's class, in percent. SQNR: of its logits against the float model's, in decibel.",
        f"Synthetic set: {origin}. {iterations} training iterations of {batch}. Median (least–most) of seeds "
        f"{', '.join(map(str, sets))}.",
    ]
    figures_of = ["agreement, {}", "where it is sure", "SQNR"]
    columns = ["W/A", *(column.format(state) for state in ("calibrated", "trained") for column in figures_of)]
    table = Table(out, "Agreement with the float model", columns, notes)
    for weight_bits, activation_bits in bits:
        quantization = Quantization(weight_bits, activation_bits)
        figures: list[list[float]] = [[] for _ in columns[1:]]
        for seed, drawn in sets.items():
            student = bench.student(quantization, drawn.images)
            measured = [bench.exported(student)]
            if iterations:
                bench.replay(student, quantization, drawn, iterations, batch, seed)
                measured.append(bench.exported(student))
            for place, logits in enumerate(measured):
                whole = _compared(logits, wanted)
                figures[3 * place].append(whole.agreement)
                if sure.any():
                    figures[3 * place + 1].append(_compared(logits[sure], wanted[sure]).agreement)
                figures[3 * place + 2].append(whole.sqnr_db)
        table.add(f"{weight_bits}/{activation_bits}", *(spread(values) if values else "" for values in figures))


def _compared(logits: Tensor, wanted: Tensor) -> reports_pb2.Accuracy:
    meter = AccuracyMeter()
    meter.update(logits.numpy(), reference=wanted.numpy())
    return meter.result()
