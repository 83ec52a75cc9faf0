"""The deployable form of a model without a labelled test set: agreement with the float model on photographs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.accuracy.bench import Bench
from benchmarks.results_table import Table, spread
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
    confidence = float(wanted.softmax(1).amax(1).mean()) * 100
    size = "×".join(map(str, bench.images.shape[2:]))
    notes = [
        f"Deployable family. {len(bench.images)} seeded crops of {pictures} photographs, resampled to {size}. No "
        f"labels: the float model sees {classes} of {wanted.shape[1]} classes in them, with a mean "
        f"confidence of {confidence:.1f} %.",
        "Agreement: how often the exported file (`trt`, run by ONNX Runtime with optimizations off) chooses the float "
        "model's class, in percent. SQNR: of its logits against the float model's, in decibel.",
        f"Synthetic set: {origin}. {iterations} training iterations of {batch}. Median (least–most) of seeds "
        f"{', '.join(map(str, sets))}.",
    ]
    columns = ["W/A", "agreement, calibrated", "SQNR", "agreement, trained", "SQNR"]
    table = Table(out, "Agreement with the float model", columns, notes)
    for weight_bits, activation_bits in bits:
        quantization = Quantization(weight_bits, activation_bits)
        figures: list[list[float]] = [[], [], [], []]
        for seed, drawn in sets.items():
            student = bench.student(quantization, drawn.images)
            measured = [bench.exported(student)]
            if iterations:
                bench.replay(student, quantization, drawn, iterations, batch, seed)
                measured.append(bench.exported(student))
            for place, logits in enumerate(measured):
                meter = AccuracyMeter()
                meter.update(logits.numpy(), reference=wanted.numpy())
                figures[2 * place].append(meter.result().agreement)
                figures[2 * place + 1].append(meter.result().sqnr_db)
        table.add(f"{weight_bits}/{activation_bits}", *(spread(values) if values else "" for values in figures))
