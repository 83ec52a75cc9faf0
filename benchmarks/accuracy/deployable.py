"""The deployable form: accuracy of the exported graph, run by ONNX Runtime, at several bit widths and seeds."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.bench import REFINED_NOTE, Bench
from benchmarks.results_table import Table, spread
from services.quantizer.config import Quantization


def deployable(
    bench: Bench,
    settings: Sequence[tuple[int, int, int]],
    seeds: Sequence[int],
    synthesis_iterations: int,
    images: int,
    batch: int,
    out: Path | None,
) -> None:
    """Print and write the table of ``settings``: bits of weights, of activations, training iterations.

    A seed is that of the generator, of its draws and of the training's order.
    """
    full = bench.top1(bench.teacher_logits)
    notes = [
        f"Deployable family. Full precision: {full:.2f} % top-1 of {len(bench.labels)} images. Replay: "
        f"{synthesis_iterations} generator steps of 32, {images} images, {REFINED_NOTE}, training in "
        f"batches of {batch}.",
        "Exported: the `trt` file run by ONNX Runtime with optimizations off. `ort`: the file with INT8 kernels, last "
        f"seed. Simulated: the fake-quantized student. Median (least–most) of seeds {', '.join(map(str, seeds))}.",
    ]
    columns = ["W/A", "iterations", "before training, exported", "exported", "exported − float", "agreement"]
    columns += ["simulated", "`ort`"]
    table = Table(out, "Deployable accuracy", columns, notes)
    sets = {seed: bench.synthesize(synthesis_iterations, images, 32, seed) for seed in seeds}
    for weight_bits, activation_bits, iterations in settings:
        quantization = Quantization(weight_bits, activation_bits)
        before, exported, simulated, agreement = [], [], [], []
        for seed in seeds:
            student = bench.student(quantization, sets[seed].images)
            logits = bench.exported(student)
            before.append(bench.top1(logits))
            if iterations:
                bench.replay(student, quantization, sets[seed], iterations, batch, seed)
                logits = bench.exported(student)
            exported.append(bench.top1(logits))
            agreement.append(bench.agreement(logits))
            simulated.append(bench.top1(bench.simulated(student)))
        ort = bench.top1(bench.exported(student, "ort"))
        difference = spread([value - full for value in exported])
        table.add(
            f"{weight_bits}/{activation_bits}",
            iterations,
            spread(before),
            spread(exported),
            difference,
            spread(agreement),
            spread(simulated),
            f"{ort:.2f}",
        )
