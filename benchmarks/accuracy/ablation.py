"""Where the accuracy of simulated quantization comes from: activations, weights, bits, and what is quantized at all.

The simulated rows have the same synthetic set and the same training, and differ in one thing at a time. So those of one
bit width may be subtracted: PER_KERNEL minus PER_OUTPUT_CHANNEL is what weights give that no engine can
quantize so; PER_SAMPLE_CHANNEL minus PER_CHANNEL is what ranges of each sample give beyond static ones. The last
row of a width is the deployable form with its own defaults (optimizer, features, flat areas), to compare with.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.bench import REFINED_NOTE, Bench
from benchmarks.results_table import Table, spread
from services.quantizer.config import ActivationGranularity, Quantization, WeightGranularity


def ablation(
    bench: Bench,
    bits: Sequence[int],
    seeds: Sequence[int],
    synthesis_iterations: int,
    images: int,
    iterations: int,
    batch: int,
    out: Path | None,
) -> None:
    """Print and write the table; ``iterations`` 0 leaves training out."""
    full = bench.top1(bench.teacher_logits)
    notes = [
        f"Simulated, but for the last row of each width. Full precision: {full:.2f} % of {len(bench.labels)} images.",
        f"One synthetic set a seed for all rows: {synthesis_iterations} generator steps of 32, {images} images, "
        f"{REFINED_NOTE}, bounded by black and white: {'yes' if bench.model.pixel_range is not None else 'no'}.",
        f"{iterations} training iterations of {batch}, cosine from 1e-4 (simulated) or the default rate (deployable).",
        "Inputs: `relu`, ReLU outputs alone, as published; `every`, what each layer reads (the image at 8 bits).",
        f"Median (least–most) of seeds {', '.join(map(str, seeds))}. Deployable rows are run as exported graphs.",
    ]
    columns = ["W/A", "activations", "weights", "inputs", "before training", "after training"]
    table = Table(out, "Ablation: what gives the accuracy", columns, notes)
    sets = {seed: bench.synthesize(synthesis_iterations, images, 32, seed) for seed in seeds}
    for width in bits:
        rows = [
            Quantization(
                width,
                width,
                activation_granularity=activation,
                weight_granularity=weight,
                fold=False,
                every_input=every,
            )
            for every in (False, True)
            for activation in ActivationGranularity
            for weight in (WeightGranularity.PER_KERNEL, WeightGranularity.PER_OUTPUT_CHANNEL)
        ]
        for quantization in [*rows, Quantization(width, width)]:
            before, after = [], []
            for seed in seeds:
                rate = None if quantization.deployable else 1e-4
                measure = bench.exported if quantization.deployable else bench.simulated
                student = bench.student(quantization, sets[seed].images)
                before.append(bench.top1(measure(student)))
                if iterations:
                    bench.replay(student, quantization, sets[seed], iterations, batch, seed, rate)
                    after.append(bench.top1(measure(student)))
            table.add(
                f"{width}/{width}",
                "PER_CHANNEL, folded" if quantization.deployable else quantization.activation_granularity.name,
                quantization.weight_granularity.name,
                "every" if quantization.every_input or quantization.deployable else "relu",
                spread(before),
                spread(after) if after else "",
            )
