"""A network on its way to an engine: accuracy, exactness, INT8 layers, build time and size of every form, as a table.

    python -m benchmarks.engines --model m.pt2 --data /usr/share/datasets/fashion-mnist --bits 8/8 --bits 4/4

The forms are the float model, the fake-quantized student, its integer codes computed by PyTorch, the two ONNX files
(`trt` and `ort`, both run by ONNX Runtime), the device package, and the engine. The engine is built and its plan read;
to run it takes the GPU that it is for.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torch import Tensor, fx

from benchmarks.accuracy.bench import REFINED_NOTE, Bench
from benchmarks.accuracy.options import (
    EXAMPLE,
    Channels,
    Data,
    Limit,
    Mean,
    Model,
    Out,
    Pad,
    Std,
    Threads,
    open_bench,
    pairs_of,
)
from benchmarks.logistic import borrow_sigmoid
from benchmarks.results_table import Table
from granq import targets
from granq.v1 import common_pb2, packages_pb2
from services.common.errors import GranqError
from services.common.onnx_runtime_flavour import to_onnx_runtime
from services.common.package import write_package
from services.evaluator.building import build_plan
from services.evaluator.device import Report
from services.quantizer.batches import Batch
from services.quantizer.config import Quantization
from services.quantizer.integer import to_integer
from services.quantizer.jobs import layer_reports
from services.quantizer.onnx_export import export_float, export_trt
from services.quantizer.student import simulated_logits

BUILD_SECONDS = 3600.0
COLUMNS = (
    "W/A",
    "simulated",
    "`trt`",
    "`ort`",
    "`trt` − codes",
    "`ort` − `trt`",
    "relative",
    "INT8 in ONNX Runtime",
    "INT8 in the plan",
    "build, s",
    "`trt`, bytes",
    "engine, bytes",
    "package, bytes",
)
Build = Callable[[Path], tuple[str, str, str]]
"""Takes the `trt` file; returns INT8 layers, seconds and bytes of the engine, as cells."""


def difference(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Compare logits N×K.

    Returns:
        The largest difference, and the largest in proportion to the largest logit of its image.
    """
    gaps = (got.double() - wanted.double()).abs().amax(1)
    sizes = wanted.double().abs().amax(1)
    return float(gaps.max()), float((gaps / sizes.clamp_min(torch.finfo(torch.float32).tiny)).max())


def measure(bench: Bench, student: fx.GraphModule, name: str, build: Build) -> tuple[str, ...]:
    """Return the cells of a deployable student, all but the first."""
    integer = to_integer(student)
    trt = export_trt(integer, bench.model.input_shape)
    ort = to_onnx_runtime(trt)
    files = bench.opened(trt, "trt"), bench.opened(ort, "ort")
    exact, fast = (bench.run(file) for file in files)
    about = packages_pb2.PackageManifest(
        model_name=name,
        input_shape=bench.model.input_shape,
        num_classes=bench.model.num_classes,
        layers=layer_reports(integer),
    )
    package = write_package(trt.SerializeToString(), ort.SerializeToString(), about)
    borrow_sigmoid(integer)
    kernels = files[1].kernels
    assert kernels is not None  # noqa: S101 - of this form they are always counted
    layers, seconds, engine = build(bench.folder / "model_trt.onnx")
    return (
        *(f"{bench.top1(logits):.2f}" for logits in (bench.simulated(student), exact, fast)),
        _small(difference(exact, simulated_logits(integer, bench.images))[0]),
        *(_small(figure) for figure in difference(fast, exact)),
        f"{kernels.int8} of {kernels.total}",
        layers,
        seconds,
        f"{trt.ByteSize():,}",
        engine,
        f"{len(package):,}",
    )


def _small(figure: float) -> str:
    return f"{figure:.1e}" if figure else "0"


def build_engine(graph: Path, target: common_pb2.EngineTarget) -> tuple[str, str, str]:
    """Build an engine; where that fails, the first cell is the reason, and what it means goes to standard error."""
    plan = graph.with_name("model.engine")
    try:
        built = build_plan(graph, graph.name, target, plan, Report(_say), BUILD_SECONDS)
    except GranqError as error:
        _say(error.message)
        return error.reason, "–", "–"
    layers = f"{built.audit.int8} of {built.audit.total}" if built.audit is not None else "not told"
    return layers, f"{built.outcome.seconds:.1f}", f"{plan.stat().st_size:,}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def engines(
    bench: Bench,
    bits: Sequence[tuple[int, int]],
    data: Batch,
    replay: tuple[int, int, int],
    name: str,
    build: Build,
    notes: Sequence[str],
    out: Path | None,
) -> None:
    """Print and write the table.

    Args:
        bench: The model and the labelled images.
        bits: Of weights and activations, one row each.
        data: The synthetic set that students are calibrated and trained on.
        replay: Training iterations, images in each, and seed.
        name: Of the model.
        build: Builds an engine.
        notes: What the synthetic set and the engine are.
        out: Markdown file.
    """
    proto = export_float(bench.model.module, bench.model.input_shape)
    full = bench.top1(bench.run(bench.opened(proto, "float")))
    forms = (
        f"Full precision, the float ONNX file in ONNX Runtime: {full:.2f} % top-1 of {len(bench.labels)} images; "
        f"{proto.ByteSize():,} bytes.",
        "Top-1 of the fake-quantized student, of the `trt` file run without optimizations, and of the `ort` file. "
        "Largest differences between logits: `trt` from the integer codes computed by PyTorch (with ONNX Runtime's "
        "logistic function, where there is one), and `ort` from `trt`, also in proportion to the largest logit of the "
        "image. INT8: convolutions and linear layers, of all.",
    )
    table = Table(out, f"Forms of {name}", COLUMNS, (*forms, *notes))
    for weight_bits, activation_bits in bits:
        quantization = Quantization(weight_bits, activation_bits)
        student = bench.student(quantization, data.images)
        bench.replay(student, quantization, data, *replay)
        table.add(f"{weight_bits}/{activation_bits}", *measure(bench, student, name, build))


def main(
    data: Data,
    model: Model = EXAMPLE,
    bits: Annotated[list[str] | None, typer.Option(help="W/A, repeatable.")] = None,
    target: Annotated[str, typer.Option(help="A shipped target, or a file of one's own.")] = "rtx-ada",
    seed: Annotated[int, typer.Option(help="Of the generator, its draws, and the training's order.")] = 0,
    synthesis_iterations: Annotated[int, typer.Option(help="Generator steps.")] = 500,
    images: Annotated[int, typer.Option(help="Synthetic images.")] = 1536,
    iterations: Annotated[int, typer.Option(help="Training iterations; 0 leaves training out.")] = 300,
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
    """What a network becomes on its way to an engine."""
    if threads:
        torch.set_num_threads(threads)
    wanted = targets.load(target)
    notes = (
        f"Synthetic set: {synthesis_iterations} generator steps of 32, {images} images, {REFINED_NOTE}, seed {seed}; "
        f"{iterations} training iterations of {batch}.",
        f"Engine: {wanted.title} (target `{wanted.name}`), built on this machine.",
    )
    pairs = pairs_of(bits or ["8/8", "4/8", "4/4"])
    with TemporaryDirectory() as folder:
        bench = open_bench(model, data, mean, std, pad, channels, limit, folder, bounded=bounded)
        drawn = bench.synthesize(synthesis_iterations, images, 32, seed)
        replay = iterations, batch, seed
        engines(bench, pairs, drawn, replay, model.stem, lambda graph: build_engine(graph, wanted.engine), notes, out)


if __name__ == "__main__":
    typer.run(main)
