"""Prints tables of speed. Each measures the baseline (``published.py``) and ours in turn, in one run.

    python -m benchmarks.speed fake-quant --threads 1
    python -m benchmarks.speed iteration --network resnet20 --batch 16
    python -m benchmarks.speed growth
    python -m benchmarks.speed narrow --model m.pt2 --data /usr/share/datasets/fashion-mnist

A machine that others use too is better asked for the processor time of the one computing thread: ``--clock cpu``.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from benchmarks.accuracy.options import Channels, Data, Limit, Mean, Model, Pad, Seeds, Std, open_bench
from benchmarks.results_table import Table
from benchmarks.speed import fake_quant, iteration, narrow
from benchmarks.speed.timing import clock_of, keep_freed_memory

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Out = Annotated[Path | None, typer.Option(help="Markdown file to write, after each row.")]
Runs = Annotated[int, typer.Option(help="Times that each variant is measured; medians are shown.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
ClockName = Annotated[str, typer.Option("--clock", help="wall, or cpu: the time of the one computing thread.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]
CLOCKS = {"wall": "Wall time.", "cpu": "Processor time of the one computing thread, since others use the machine too."}


def _prepare(threads: int, clock: str, device: str) -> tuple[torch.device, str]:
    torch.set_num_threads(threads)
    found = torch.device(device)
    clock_of(clock, found)
    keep_freed_memory()
    name = torch.cuda.get_device_name(found) if found.type == "cuda" else f"CPU, {threads} threads"
    return found, f"{name}; PyTorch {torch.__version__}. {CLOCKS[clock]}"


@app.command("fake-quant")
def fake_quant_table(
    runs: Runs = 15, threads: Threads = 1, clock: ClockName = "wall", device: Device = "cpu", out: Out = None
) -> None:
    """Fake quantization forward and backward, by shape, number type and granularity."""
    where, note = _prepare(threads, clock, device)
    table = Table(out, "Fake quantization, forward and backward", fake_quant.COLUMNS, (note, *fake_quant.NOTES))
    for row in fake_quant.rows(runs, clock_of(clock, where), where):
        table.add(*row)


@app.command("iteration")
def iteration_table(
    network: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(iteration.NETWORKS)}; default: all.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images in an iteration.")] = 16,
    runs: Runs = 7,
    threads: Threads = 1,
    clock: ClockName = "wall",
    device: Device = "cpu",
    memory: Annotated[bool, typer.Option(help="Also measure the peak of memory.")] = True,
    bfloat16: Annotated[bool, typer.Option(help="Add a row in which our layers compute in bfloat16.")] = True,
    out: Out = None,
) -> None:
    """An iteration of joint training in one process, generator included."""
    where, note = _prepare(threads, clock, device)
    table = Table(out, "Iteration of joint training", iteration.COLUMNS, (note, *iteration.NOTES))
    for name in network or iteration.NETWORKS:
        for own in (False, True) if bfloat16 else (False,):
            row = iteration.row(name, batch, runs, clock_of(clock, where), where, memory=memory, bfloat16=own)
            table.add(*row)


@app.command("growth")
def growth_table(
    runs: Runs = 3, threads: Threads = 1, clock: ClockName = "wall", device: Device = "cpu", out: Out = None
) -> None:
    """How time and memory of an iteration grow with batch, image size and network."""
    where, note = _prepare(threads, clock, device)
    table = Table(out, "Growth of an iteration of joint training", iteration.GROWTH_COLUMNS, (note,))
    for name, batch, side in iteration.GROWTH:
        table.add(*iteration.growth_row(name, batch, side, runs, clock_of(clock, where), where))


@app.command("narrow")
def narrow_table(
    model: Model,
    data: Data,
    case: Annotated[list[str] | None, typer.Option(help="bits@epochs, warm-up of 4 included; repeatable.")] = None,
    seeds: Seeds = "0,1,2",
    mean: Mean = 0.2860,
    std: Std = 0.3530,
    pad: Pad = 2,
    channels: Channels = 3,
    limit: Limit = 0,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Accuracy after training with layers in float32 and in bfloat16."""
    _, note = _prepare(threads, "wall", "cpu")
    with TemporaryDirectory() as folder:
        bench = open_bench(model, data, mean, std, pad, channels, limit, folder, bounded=False)
        table = Table(out, "Training in bfloat16: accuracy", narrow.COLUMNS, (note, *narrow.notes(bench)))
        settings = [text.partition("@") for text in case or ["4@6"]]
        cases = [
            narrow.Case(int(bits), int(epochs), int(seed)) for bits, _, epochs in settings for seed in seeds.split(",")
        ]
        for row in narrow.rows(bench, cases):
            table.add(*row)


if __name__ == "__main__":
    app()
