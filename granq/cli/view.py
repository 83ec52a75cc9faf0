"""How pipelines look on a terminal."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from granq.transfer import digest_of
from granq.v1 import artifacts_pb2, common_pb2, coordinator_pb2, reports_pb2

if TYPE_CHECKING:
    from rich.console import Console

FORMS = {
    reports_pb2.MEASURED_FORM_FLOAT: "full precision",
    reports_pb2.MEASURED_FORM_SIMULATED: "{bits} simulated",
    reports_pb2.MEASURED_FORM_ONNX_TRT: "{bits} graph for TensorRT",
    reports_pb2.MEASURED_FORM_ONNX_ORT: "{bits} graph, INT8 kernels",
    reports_pb2.MEASURED_FORM_ENGINE: "{bits} engine",
}
RUNTIMES = {
    common_pb2.RUNTIME_UNSPECIFIED: "any runtime",
    common_pb2.RUNTIME_ONNXRUNTIME: "ONNX Runtime",
    common_pb2.RUNTIME_TENSORRT: "TensorRT",
    common_pb2.RUNTIME_TENSORRT_RTX: "TensorRT-RTX",
}


def state_name(state: int) -> str:
    """Return a pipeline state without its prefix, such as "RUNNING"."""
    return coordinator_pb2.PipelineState.Name(state).removeprefix("PIPELINE_STATE_")


def stage_name(stage: int) -> str:
    """Return a stage for people, such as "build engines"; "" for none."""
    if stage == coordinator_pb2.STAGE_UNSPECIFIED:
        return ""
    return coordinator_pb2.Stage.Name(stage).removeprefix("STAGE_").lower().replace("_", " ")


def bits(spec: coordinator_pb2.PipelineSpec) -> str:
    """Return the number formats in short, such as "W4A4"; "W4A4*" where some layers differ."""
    config = spec.quantization
    return f"W{config.weight_bits}A{config.activation_bits}{'*' if config.overrides else ''}"


def size(count: int) -> str:
    """Return a number of bytes for people, such as "1.5 MiB"."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


@contextmanager
def transfer_bar(console: "Console", text: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while a transfer lasts; yields the function to call with (bytes done, bytes in all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def pipelines_table(pipelines: Iterable[coordinator_pb2.Pipeline]) -> Table:
    """Return one row for each pipeline."""
    table = Table("id", "state", "stage", "bits", "model", "submitted (UTC)", box=None, pad_edge=False)
    for pipeline in pipelines:
        model = pipeline.spec.display_name or pipeline.spec.model.artifact.name or pipeline.spec.model.architecture
        submitted = pipeline.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")
        state, stage = state_name(pipeline.state), stage_name(pipeline.stage)
        table.add_row(pipeline.pipeline_id, state, stage, bits(pipeline.spec), model, submitted)
    return table


def describe(console: "Console", pipeline: coordinator_pb2.Pipeline, folder: Path | None = None) -> None:
    """Print what a pipeline is, what it measured, and where its files lie (``folder``: the unpacked bundle)."""
    results = pipeline.results
    model = pipeline.spec.display_name or pipeline.spec.model.artifact.name
    console.print(f"pipeline {pipeline.pipeline_id}  {state_name(pipeline.state)}  {model}  {bits(pipeline.spec)}")
    if pipeline.HasField("failure"):
        failure = pipeline.failure
        place = f"{failure.field}: " if failure.field else ""
        # Messages may hold brackets, which rich would take for markup.
        text = f"failed in {stage_name(pipeline.stage)}: {place}{failure.message} [{failure.reason}]"
        console.print(text, markup=False)
    if results.evaluation.measurements:
        console.print(measurements_table(pipeline))
    lines = [*_runtime_lines(results), *_engine_lines(pipeline, folder), *_unmeasured_lines(results)]
    for line in [*lines, *_size_lines(results), *_place_lines(results, folder)]:
        console.print(line, markup=False)


def measurements_table(pipeline: coordinator_pb2.Pipeline) -> Table:
    """Return one row for each form of the model that was measured; columns that nobody fills are left out."""
    formats = bits(pipeline.spec)
    rows = [_measurement_row(m, formats) for m in pipeline.results.evaluation.measurements]
    images = max(m.accuracy.images for m in pipeline.results.evaluation.measurements)
    headers = ("what ran", "top-1 %", "top-5 %", "agree %", "ms (batch)", "INT8")
    used = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    title = f"{images} images of {pipeline.results.evaluation.dataset}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index in used:
        table.add_column(headers[index], justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[index] for index in used))
    return table


def _measurement_row(measurement: reports_pb2.Measurement, formats: str) -> tuple[str, ...]:
    accuracy = measurement.accuracy
    speed = f"{measurement.latency_ms_p50:.1f} ({measurement.latency_batch})"
    return (
        FORMS.get(measurement.form, "?").format(bits=formats)
        + (f" {measurement.target}" if measurement.target else ""),
        f"{accuracy.top1:.2f}" if accuracy.HasField("top1") else "",
        f"{accuracy.top5:.2f}" if accuracy.HasField("top5") else "",
        f"{accuracy.agreement:.2f}" if accuracy.HasField("agreement") else "",
        speed if measurement.HasField("latency_ms_p50") else "",
        f"{measurement.int8_layers}/{measurement.total_layers}" if measurement.HasField("int8_layers") else "",
    )


def _runtime_lines(results: coordinator_pb2.PipelineResults) -> Iterator[str]:
    """Say what ran the graphs, and what kind of figure a simulated one is."""
    measurements = results.evaluation.measurements
    simulated = reports_pb2.MEASURED_FORM_SIMULATED
    runtimes = sorted({m.runtime for m in measurements if m.form != simulated and m.runtime})
    if runtimes:
        yield f"graphs run by {', '.join(runtimes)}"
    for measurement in measurements:
        if measurement.form == simulated:
            runtime = f" ({measurement.runtime})" if measurement.runtime else ""  # unknown where nothing was labelled
            yield f"simulated: fake quantization in PyTorch{runtime}, which no device runs"


def _unmeasured_lines(results: coordinator_pb2.PipelineResults) -> Iterator[str]:
    for engine in results.evaluation.unmeasured:
        yield f"engine {engine.target} was built and not run: {engine.failure.message}"


def _engine_lines(pipeline: coordinator_pb2.Pipeline, folder: Path | None) -> Iterator[str]:
    if pipeline.state == coordinator_pb2.PIPELINE_STATE_SUCCEEDED and not pipeline.results.engines:
        yield "engine: none was asked for"
    for outcome in pipeline.results.engines:
        target = outcome.target.name or RUNTIMES[outcome.target.runtime]
        if outcome.WhichOneof("outcome") == "failure":
            yield f"engine: none for {target}: {outcome.failure.message}"
            continue
        if outcome.WhichOneof("outcome") == "graph":
            yield f"engine: none needed for {target}; it loads {_find(folder, outcome.graph) or outcome.graph.digest}"
            continue
        manifest = outcome.engine.manifest
        place = _find(folder, manifest.engine)
        targets = ", ".join(f"sm {c}" for c in manifest.compute_capabilities) or "the GPU it was built on"
        yield (
            f"engine: {place or manifest.engine.digest}, {size(manifest.engine.size_bytes)}, "
            f"{RUNTIMES[manifest.runtime]} {manifest.runtime_version} for {targets}, {manifest.platform}"
        )


def _size_lines(results: coordinator_pb2.PipelineResults) -> Iterator[str]:
    if results.HasField("export") and results.export.packed_bytes:
        floats = f", {size(4 * results.model.parameters)} as float32" if results.model.parameters else ""
        yield f"weights: {size(results.export.packed_bytes)} packed at their own bit widths{floats}"


def _place_lines(results: coordinator_pb2.PipelineResults, folder: Path | None) -> Iterator[str]:
    if results.HasField("report"):
        yield f"report: {_find(folder, results.report) or results.report.digest}"
    if results.HasField("bundle"):
        yield f"bundle: {folder or results.bundle.digest}"


def _find(folder: Path | None, artifact: artifacts_pb2.Artifact) -> Path | None:
    """Return where an artifact lies in the unpacked bundle: the file with its content, whatever its name."""
    for path in sorted(folder.rglob("*")) if folder else ():
        if path.is_file() and path.stat().st_size == artifact.size_bytes:
            with path.open("rb") as stream:
                if digest_of(stream) == artifact.digest:
                    return path
    return None
