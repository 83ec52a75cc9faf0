"""Packs a pipeline's files into one zip artifact, streaming, so that no file is ever whole in memory."""

import zipfile
from dataclasses import dataclass

from granq.v1 import artifacts_pb2, common_pb2, coordinator_pb2
from services.common.artifacts import ArtifactStore, ArtifactWriter
from services.coordinator.report import GRID, PICTURE, report_json, report_markdown
from services.coordinator.triton import serving_files

_CHUNK = 1024 * 1024
# Zip's first day. With the true time, a repeated REPORT stage would make another bundle of the same content.
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class BundleFile:
    """A stored blob that goes into the bundle.

    Attributes:
        path: Where in the zip.
        artifact: The blob.
        note: What it is, for the report.
    """

    path: str
    artifact: artifacts_pb2.Artifact
    note: str


class _Sink:
    """What zipfile needs of an output that cannot seek."""

    def __init__(self, writer: ArtifactWriter) -> None:
        self._writer = writer

    def write(self, data: bytes, /) -> int:
        return self._writer.write(bytes(data))

    def flush(self) -> None:
        """Do nothing: the writer makes everything durable when it commits."""

    def close(self) -> None:
        """Do nothing: who opened the writer closes it."""


def bundle_files(results: coordinator_pb2.PipelineResults) -> list[BundleFile]:
    """Return what belongs into the bundle beside the report."""
    files = [BundleFile("model_quantized.safetensors", results.quantization.model, "Quantized model")]
    if results.HasField("export"):
        export = results.export
        files += [
            BundleFile(
                "model_trt.onnx", export.onnx_trt, "Q/DQ graph, signed codes: for TensorRT, and the exact reference"
            ),
            BundleFile(
                "model_ort.onnx", export.onnx_ort, "Q/DQ graph, unsigned codes: for ONNX Runtime's INT8 kernels"
            ),
            BundleFile("model_float.onnx", export.onnx_float, "Float model"),
        ]
        if export.package.digest:
            note = "Device package: both graphs at the weights' own bit widths"
            files.append(BundleFile("model.granq", export.package, note))
    for path, artifact, note in (
        (GRID, results.synthesis.grid, "Synthetic images of each class; framed where the float model sees another"),
        (PICTURE, results.quantization.diagnostics_picture, "Losses, and the noise of each layer"),
        (
            "report/diagnostics.json",
            results.quantization.diagnostics,
            "Those figures, and the clip ranges",
        ),
    ):
        if artifact.digest:
            files.append(BundleFile(path, artifact, note))
    for number, outcome in enumerate(results.engines, 1):
        if outcome.WhichOneof("outcome") == "engine":
            manifest = outcome.engine.manifest
            runtime = common_pb2.Runtime.Name(manifest.runtime).removeprefix("RUNTIME_").lower()
            stem = f"engines/{number}_{outcome.target.name or runtime}"
            files.append(BundleFile(f"{stem}.engine", manifest.engine, "Engine"))
            files.append(BundleFile(f"{stem}.json", outcome.engine.manifest_file, "Manifest of that engine"))
    return files


def build_report(store: ArtifactStore, pipeline: coordinator_pb2.Pipeline) -> coordinator_pb2.PipelineResults:
    """Store report and bundle, and return them; the same pipeline always gives the same artifacts.

    Raises:
        NotFoundError: A result's file is no longer in the store.
        DataLossError: A result's file is damaged.
        ResourceExhaustedError: The store is full.
    """
    json_bytes = report_json(pipeline)
    report = store.put_bytes(json_bytes, "report.json", "application/json")
    files = bundle_files(pipeline.results)
    for path, content, note in serving_files(pipeline.results):
        kept = store.put_bytes(content, note, "text/plain") if isinstance(content, bytes) else content
        files.append(BundleFile(path, kept, note))
    sized = [(file.path, store.stat(file.artifact.digest).size_bytes, file.note) for file in files]
    markdown = report_markdown(pipeline, sized)
    with store.writer(f"{pipeline.pipeline_id}.zip", "application/zip") as writer:
        with zipfile.ZipFile(_Sink(writer), "w") as bundle:
            for name, content in (("report.md", markdown), ("report.json", json_bytes)):
                bundle.writestr(_entry(name, zipfile.ZIP_DEFLATED), content)
            for file in files:
                _copy(store, file, bundle)
        archive = writer.commit()
    return coordinator_pb2.PipelineResults(report=report, bundle=archive)


def _entry(name: str, compression: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = compression
    entry.external_attr = 0o644 << 16
    return entry


def _copy(store: ArtifactStore, file: BundleFile, bundle: zipfile.ZipFile) -> None:
    # Weights hardly compress, and an engine is read in place by mmap-like tools after a plain unzip: store them as is.
    with (
        store.open(file.artifact.digest) as source,
        bundle.open(_entry(file.path, zipfile.ZIP_STORED), "w", force_zip64=True) as target,
    ):
        while chunk := source.read(_CHUNK):
            target.write(chunk)
