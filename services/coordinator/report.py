"""Writes what a pipeline made and measured: as JSON for programs and as Markdown for people."""

import json
from collections.abc import Collection, Iterable, Sequence

from google.protobuf.json_format import MessageToDict

from granq.v1 import common_pb2, coordinator_pb2, reports_pb2
from services.coordinator.requests import simulation_only

REPORT_VERSION = 1
# Where pictures lie in the bundle, beside the report.
GRID, PICTURE = "report/synthetic_images.png", "report/diagnostics.png"

_FORMS = {
    reports_pb2.MEASURED_FORM_FLOAT: "Float model",
    reports_pb2.MEASURED_FORM_SIMULATED: "Quantized, simulated (PyTorch)",
    reports_pb2.MEASURED_FORM_ONNX_TRT: "Exported graph, exact (model_trt.onnx)",
    reports_pb2.MEASURED_FORM_ONNX_ORT: "Exported graph, INT8 kernels (model_ort.onnx)",
    reports_pb2.MEASURED_FORM_ENGINE: "Engine on a GPU",
}
_GRANULARITIES = {
    0: "per channel, static",
    common_pb2.ACTIVATION_GRANULARITY_PER_TENSOR: "per tensor, dynamic (simulation only)",
    common_pb2.ACTIVATION_GRANULARITY_PER_CHANNEL: "per channel, static",
    common_pb2.ACTIVATION_GRANULARITY_PER_SAMPLE_CHANNEL: "per sample and channel, dynamic (simulation only)",
}


def report_json(pipeline: coordinator_pb2.Pipeline) -> bytes:
    """Return the report as indented JSON; equal pipelines give equal bytes.

    "spec" and "results" are the messages of granq.v1 in their JSON form, with the field names of the contract.
    """
    report = {
        "format": "granq-report",
        "version": REPORT_VERSION,
        "pipeline_id": pipeline.pipeline_id,
        "create_time": pipeline.create_time.ToJsonString(),
        "spec": MessageToDict(pipeline.spec, preserving_proto_field_name=True),
        "results": MessageToDict(pipeline.results, preserving_proto_field_name=True),
    }
    return (json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def report_markdown(pipeline: coordinator_pb2.Pipeline, files: Sequence[tuple[str, int, str]]) -> bytes:
    """Return the report for people.

    Args:
        pipeline: The pipeline with its results.
        files: Path in the bundle, size in bytes and meaning of every file beside the report.
    """
    spec, results = pipeline.spec, pipeline.results
    lines = [f"# {_text(spec.display_name or pipeline.pipeline_id)}", ""]
    lines += _table(("", ""), _overview(pipeline))
    lines += ["", "## Accuracy and speed", "", f"Measured on: {_text(results.evaluation.dataset)}.", ""]
    head = ("Form", "Top-1 %", "Top-5 %", "Agreement %", "SQNR dB", "Latency ms", "INT8 layers", "Images", "Ran on")
    lines += _table(head, map(_measurement, results.evaluation.measurements), range(1, 8))
    lines += ["", *_notes(pipeline)]
    lines += _batches(results.evaluation.measurements)
    if results.engines:
        lines += ["", "## Engines", ""]
        lines += _table(
            ("Target", "Outcome", "Built for", "INT8 layers", "Build s"), map(_engine, results.engines), (3, 4)
        )
        lines += _float_layers(results.engines)
    if results.export.float_operations:
        lines += ["", "## Operations that stay in floating point", ""]
        lines += [f"- {_text(name)}" for name in results.export.float_operations]
    for title, path, artifact in (
        ("Synthetic images", GRID, results.synthesis.grid),
        ("Training and noise of the layers", PICTURE, results.quantization.diagnostics_picture),
    ):
        if artifact.digest:
            lines += ["", f"## {title}", "", f"![{title}]({path})"]
    if files:
        lines += ["", "## Files", ""]
        rows = [(f"`{name}`", f"{size:,}", note) for name, size, note in files]
        lines += _table(("File", "Bytes", "What it is"), rows, (1,))
    return ("\n".join(lines) + "\n").encode()


def _overview(pipeline: coordinator_pb2.Pipeline) -> list[tuple[str, str]]:
    spec, results = pipeline.spec, pipeline.results
    model, bits = results.model, spec.quantization
    shape = " × ".join(map(str, model.input_shape))
    rows = [
        ("Pipeline", pipeline.pipeline_id),
        ("Submitted", pipeline.create_time.ToJsonString()),
        ("Model", f"{_text(spec.model.architecture or spec.model.artifact.name or spec.model.artifact.digest)}"),
        ("Input", f"{shape}; {model.num_classes} classes"),
        ("Parameters", f"{model.parameters:,}"),
        ("Weights", f"{bits.weight_bits} bits"),
        ("Activations", f"{bits.activation_bits} bits, {_GRANULARITIES[bits.activation_granularity]}"),
    ]
    if bits.overrides:
        rows.append(("Layers with other bits", str(len(bits.overrides))))
    quantization = results.quantization
    loss = f", loss {quantization.loss:.4g}" if quantization.HasField("loss") else ""
    seconds = f"{quantization.seconds:.0f} s on {_text(quantization.device)}"
    rows.append(("Training", f"{quantization.iterations:,} iterations{loss}, {seconds}"))
    synthesis = results.synthesis
    rows.append(
        (
            "Synthetic set",
            f"{synthesis.num_images:,} images, BatchNorm loss {synthesis.bn_loss:.4g}, no training data used",
        )
    )
    if results.HasField("export"):
        rows.append(("Packed weights", f"{results.export.packed_bytes:,} bytes"))
    return rows


def _measurement(row: reports_pb2.Measurement) -> tuple[str, ...]:
    accuracy = row.accuracy
    latency = f"{row.latency_ms_p50:.2f} (batch {row.latency_batch})" if row.HasField("latency_ms_p50") else "–"
    layers = f"{row.int8_layers} of {row.total_layers}" if row.HasField("int8_layers") else "–"
    return (
        _FORMS.get(row.form, "Unknown") + (f", {_text(row.target)}" if row.target else ""),
        f"{accuracy.top1:.2f}" if accuracy.HasField("top1") else "–",
        f"{accuracy.top5:.2f}" if accuracy.HasField("top5") else "–",
        f"{accuracy.agreement:.2f}" if accuracy.HasField("agreement") else "–",
        f"{accuracy.sqnr_db:.1f}" if accuracy.HasField("sqnr_db") else "–",
        latency,
        layers,
        f"{accuracy.images:,}" if accuracy.images else "–",
        _text(", ".join(part for part in (row.runtime, row.device) if part) or "–"),
    )


def _batches(rows: Iterable[reports_pb2.Measurement]) -> list[str]:
    """Return the section on engines at each batch; nothing where none was measured."""
    measured = [_batch(row, batch) for row in rows for batch in row.batches]
    head = ("Engine", "Batch", "Mean ms", "Median ms", "99 % below", "Images/s", "Agreement %", "Logits differ by")
    return ["", "## Engines at each batch", "", *_table(head, measured, range(1, 8))] if measured else []


def _batch(row: reports_pb2.Measurement, batch: reports_pb2.BatchMeasurement) -> tuple[str, ...]:
    times = (batch.latency_ms_mean, batch.latency_ms_p50, batch.latency_ms_p99)
    return (
        _text(row.target),
        str(batch.batch),
        *(f"{time:.3f}" for time in times),
        f"{batch.images_per_second:,.0f}",
        f"{batch.agreement:.2f}" if batch.HasField("agreement") else "–",
        f"{batch.largest_difference:.3g}" if batch.HasField("largest_difference") else "–",
    )


def _notes(pipeline: coordinator_pb2.Pipeline) -> list[str]:
    spec = pipeline.spec
    notes = [
        "“Simulated” is fake quantization in PyTorch, not what a device runs. “Agreement” is with the float model."
    ]
    if not spec.HasField("dataset"):
        notes.append("No labelled set was given, so accuracy is unknown; agreement was measured on synthetic images.")
    if simulation_only(spec):
        notes.append("This granularity has no integer form: there are no graphs and no engines.")
    elif min(spec.quantization.weight_bits, spec.quantization.activation_bits) < 8:
        notes.append(
            "Below 8 bits the graphs still run as INT8, with fewer levels: files shrink when packed, speed stays."
        )
    if pipeline.results.HasField("export") and not pipeline.results.export.exact:
        notes.append("Some accumulators can pass 2^24, so float32 runs of the exact graph may round.")
    ort = (row for row in pipeline.results.evaluation.measurements if row.form == reports_pb2.MEASURED_FORM_ONNX_ORT)
    if any(row.int8_layers < row.total_layers for row in ort):
        notes.append(
            "In model_ort.onnx a convolution whose output is not rounded at once, such as before a sum, works on codes "
            "in float32, which ONNX Runtime does faster than in integers."
        )
    notes += [
        f"Engine {_text(engine.target)} was not run: {_text(engine.failure.message)}"
        for engine in pipeline.results.evaluation.unmeasured
    ]
    return [f"- {note}" for note in notes]


def _float_layers(engines: Iterable[coordinator_pb2.EngineOutcome]) -> list[str]:
    found = [
        f"- {_target(outcome)}: {_text(layer.name)} ({_text(layer.kind)}) runs in floating point: {_text(layer.reason)}"
        for outcome in engines
        for layer in outcome.engine.float_layers
    ]
    return ["", *found] if found else []


def _target(outcome: coordinator_pb2.EngineOutcome) -> str:
    runtime = common_pb2.Runtime.Name(outcome.target.runtime).removeprefix("RUNTIME_").lower()
    return _text(outcome.target.name) or ("default runtime" if runtime == "unspecified" else runtime)


def _engine(outcome: coordinator_pb2.EngineOutcome) -> tuple[str, ...]:
    target = _target(outcome)
    if outcome.WhichOneof("outcome") == "graph":
        return target, "none needed: ONNX Runtime loads model_ort.onnx", "–", "–", "–"
    if outcome.WhichOneof("outcome") != "engine":
        return target, f"not built: {_text(outcome.failure.message)}", "–", "–", "–"
    built, manifest = outcome.engine, outcome.engine.manifest
    runtime = common_pb2.Runtime.Name(manifest.runtime).removeprefix("RUNTIME_").lower()
    layers = f"{built.int8_layers} of {built.total_layers}" if built.HasField("int8_layers") else "–"
    place = ", ".join([*manifest.compute_capabilities, manifest.platform])
    size = f"{manifest.engine.size_bytes:,} bytes"
    return target, f"{runtime} {_text(manifest.runtime_version)}, {size}", _text(place), layers, f"{built.seconds:.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> list[str]:
    rule = ["---:" if column in numbers else "---" for column in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _text(value: str) -> str:
    """Return text from outside so that it can neither break a table nor become markup."""
    flat = " ".join(value.split())
    return "".join("\\" + letter if letter in "\\|`*_<>[]#" else letter for letter in flat)
