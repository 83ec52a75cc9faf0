"""Command line of the accuracy tables.

python -m benchmarks.accuracy deployable --model m.pt2 --data /usr/share/datasets/fashion-mnist --bits 4/4 --bits 8/8
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from benchmarks.accuracy.ablation import ablation
from benchmarks.accuracy.agreement import agreement
from benchmarks.accuracy.bench import Bench, load
from benchmarks.accuracy.deployable import deployable
from benchmarks.accuracy.options import (
    EXAMPLE,
    Channels,
    Data,
    Limit,
    Mean,
    Model,
    Out,
    Pad,
    Seeds,
    Std,
    Threads,
    open_bench,
    pairs_of,
)
from benchmarks.accuracy.photographs import crops
from benchmarks.accuracy.reproduce import SETTINGS, reproduce
from granq.v1 import common_pb2
from services.generator.synthetic_set import REFINEMENT_STEPS, SetPlan

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Accuracy without data, measured.")


@app.command("deployable")
def deployable_command(
    data: Data,
    model: Model = EXAMPLE,
    bits: Annotated[list[str] | None, typer.Option(help="W/A, or W/A@training iterations; repeatable.")] = None,
    seeds: Seeds = "0,1,2",
    synthesis_iterations: Annotated[int, typer.Option(help="Generator steps.")] = 500,
    images: Annotated[int, typer.Option(help="Synthetic images.")] = 1536,
    iterations: Annotated[int, typer.Option(help="Training iterations, where bits name none.")] = 300,
    batch: Annotated[int, typer.Option(help="Images in an iteration.")] = 32,
    mean: Mean = 0.2860,
    std: Std = 0.3530,
    pad: Pad = 0,
    channels: Channels = 1,
    limit: Limit = 0,
    threads: Threads = 0,
    bounded: Annotated[bool, typer.Option(help="Tell the generator what black and white are.")] = True,
    out: Out = None,
) -> None:
    """Accuracy of the exported graph."""
    if threads:
        torch.set_num_threads(threads)
    rows = [text.partition("@") for text in bits or ["8/8", "4/8", "4/4", "3/3", "2/8"]]
    settings = [(*pairs_of([pair])[0], int(own) if own else iterations) for pair, _, own in rows]
    with TemporaryDirectory() as folder:
        bench = open_bench(model, data, mean, std, pad, channels, limit, folder, bounded=bounded)
        numbers = [int(seed) for seed in seeds.split(",")]
        deployable(bench, settings, numbers, synthesis_iterations, images, batch, out)


@app.command("agreement")
def agreement_command(
    model: Annotated[Path, typer.Option(help="A .pt2 program of RGB images.")],
    images: Annotated[Path, typer.Option(help="Folder of photographs.")],
    crop_count: Annotated[int, typer.Option("--crops", help="Crops in all.")] = 1024,
    crop_seed: Annotated[int, typer.Option(help="Of their places.")] = 0,
    bits: Annotated[list[str] | None, typer.Option(help="W/A, repeatable.")] = None,
    seeds: Seeds = "0",
    synthesis_iterations: Annotated[int, typer.Option(help="Generator steps.")] = 200,
    synthetic_images: Annotated[int, typer.Option(help="Images in the set.")] = 512,
    refined: Annotated[float, typer.Option(help="Of these, the share that is refined; 1: no generator.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Of the refinement.")] = REFINEMENT_STEPS,
    iterations: Annotated[int, typer.Option(help="Training iterations; 0 leaves training out.")] = 0,
    batch: Annotated[int, typer.Option(help="Images in a step and in an iteration.")] = 16,
    mean: Mean = 0.5,
    std: Std = 0.5,
    threads: Threads = 0,
    out: Out = None,
) -> None:
    """Agreement with the float model on photographs, where there are no labels."""
    if threads:
        torch.set_num_threads(threads)
    with TemporaryDirectory() as folder:
        loaded = load(model, Path(folder), common_pb2.Normalization(mean=[mean], std=[std]))
        photographs, pictures = crops(images, crop_count, loaded.input_shape[1:], [mean], [std], crop_seed)
        bench = Bench(loaded, photographs, torch.zeros(0, dtype=torch.int64), Path(folder))
        numbers = [int(seed) for seed in seeds.split(",")]
        pairs = pairs_of(bits or ["8/8", "4/8"])
        sets = {n: bench.synthesize(synthesis_iterations, synthetic_images, batch, n, refined, steps) for n in numbers}
        plan = SetPlan.of(synthetic_images, refined, steps)
        drawn = f"{synthesis_iterations} generator steps of {batch}, " if plan.drawn else ""
        origin = f"{drawn}{plan.count} images, {plan.refined} of them refined in {steps} steps of {batch}"
        agreement(bench, pictures, pairs, sets, origin, iterations, batch, out)


@app.command("ablation")
def ablation_command(
    data: Data,
    model: Model = EXAMPLE,
    bits: Annotated[str, typer.Option(help="Widths, separated by commas.")] = "3,4,5,8",
    seeds: Seeds = "0,1,2",
    synthesis_iterations: Annotated[int, typer.Option(help="Generator steps.")] = 500,
    images: Annotated[int, typer.Option(help="Synthetic images.")] = 1536,
    iterations: Annotated[int, typer.Option(help="Training iterations; 0 leaves training out.")] = 0,
    batch: Annotated[int, typer.Option(help="Images in an iteration.")] = 16,
    mean: Mean = 0.2860,
    std: Std = 0.3530,
    pad: Pad = 0,
    channels: Channels = 1,
    limit: Limit = 2000,
    threads: Threads = 0,
    bounded: Annotated[bool, typer.Option(help="Tell the generator what black and white are.")] = True,
    out: Out = None,
) -> None:
    """What gives the accuracy: granularities, bits, inputs."""
    if threads:
        torch.set_num_threads(threads)
    with TemporaryDirectory() as folder:
        bench = open_bench(model, data, mean, std, pad, channels, limit, folder, bounded=bounded)
        widths, numbers = ([int(part) for part in text.split(",")] for text in (bits, seeds))
        ablation(bench, widths, numbers, synthesis_iterations, images, iterations, batch, out)


@app.command("reproduce")
def reproduce_command(
    data: Data,
    model: Model = EXAMPLE,
    rows: Annotated[str, typer.Option(help="Numbers of the rows, from 0, separated by commas; default: all.")] = "",
    seeds: Seeds = "0,1,2",
    mean: Mean = 0.2860,
    std: Std = 0.3530,
    pad: Pad = 0,
    channels: Channels = 1,
    limit: Limit = 0,
    threads: Threads = 0,
    out: Out = None,
) -> None:
    """The published method at its own settings, simulated."""
    if threads:
        torch.set_num_threads(threads)
    chosen = [SETTINGS[int(row)] for row in rows.split(",")] if rows else SETTINGS
    with TemporaryDirectory() as folder:
        bench = open_bench(model, data, mean, std, pad, channels, limit, folder, bounded=False)
        reproduce(bench, chosen, [int(seed) for seed in seeds.split(",")], out)


if __name__ == "__main__":
    app()
