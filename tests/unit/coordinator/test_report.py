"""Report and bundle: complete, readable, the same bytes every time, safe against what users write."""

import json
import zipfile

import pytest
from google.protobuf.json_format import ParseDict

from granq.v1 import common_pb2, coordinator_pb2, reports_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import NotFoundError
from services.coordinator.bundle import build_report
from services.coordinator.report import report_markdown
from tests.support.pipelines import artifact, results, spec


@pytest.fixture
def pipeline(store: ArtifactStore) -> coordinator_pb2.Pipeline:
    made = coordinator_pb2.Pipeline(pipeline_id="p-1", spec=spec(), results=results(store))
    made.spec.dataset.CopyFrom(common_pb2.Dataset(path="fashion", format=common_pb2.DATASET_FORMAT_IDX))
    made.create_time.FromSeconds(1_790_000_000)
    return made


def test_the_bundle_holds_every_file_with_its_bytes(store: ArtifactStore, pipeline: coordinator_pb2.Pipeline) -> None:
    part = build_report(store, pipeline)
    assert (part.bundle.name, part.bundle.media_type) == ("p-1.zip", "application/zip")
    with zipfile.ZipFile(store.local_path(part.bundle.digest)) as bundle:
        assert bundle.testzip() is None
        content = {name: bundle.read(name) for name in bundle.namelist() if not name.startswith("triton/")}
    assert content.pop("report.json") == store.read_bytes(part.report.digest)
    markdown = content.pop("report.md").decode()
    assert content == {
        "model_quantized.safetensors": b"quantized",
        "model_trt.onnx": b"trt" * 1000,
        "model_ort.onnx": b"ort",
        "model_float.onnx": b"float",
        "model.granq": b"package",
        "engines/1_tensorrt_rtx.engine": b"engine",
        "engines/1_tensorrt_rtx.json": b"{}",
    }
    assert "| Float model | 93.84 |" in markdown
    assert "not built: install tensorrt \\| now" in markdown
    assert "`model_trt.onnx` | 3,000 |" in markdown
    assert "BatchNorm loss 1.5" in markdown
    assert "| --- | ---: | --- |" in markdown


def test_the_same_pipeline_gives_the_same_artifacts(store: ArtifactStore, pipeline: coordinator_pb2.Pipeline) -> None:
    assert build_report(store, pipeline) == build_report(store, pipeline)


def test_the_json_report_reads_back_as_messages(store: ArtifactStore, pipeline: coordinator_pb2.Pipeline) -> None:
    report = json.loads(store.read_bytes(build_report(store, pipeline).report.digest))
    assert (report["format"], report["version"], report["pipeline_id"]) == ("granq-report", 1, "p-1")
    assert ParseDict(report["results"], coordinator_pb2.PipelineResults()) == pipeline.results
    assert ParseDict(report["spec"], coordinator_pb2.PipelineSpec()) == pipeline.spec


def test_simulation_only_reports_what_there_is(store: ArtifactStore, pipeline: coordinator_pb2.Pipeline) -> None:
    pipeline.spec.quantization.activation_granularity = common_pb2.ACTIVATION_GRANULARITY_PER_TENSOR
    pipeline.results.ClearField("export")
    pipeline.results.ClearField("engines")
    part = build_report(store, pipeline)
    with zipfile.ZipFile(store.local_path(part.bundle.digest)) as bundle:
        assert bundle.namelist() == ["report.md", "report.json", "model_quantized.safetensors"]
        assert "no integer form" in bundle.read("report.md").decode()


@pytest.mark.parametrize(
    ("form", "int8", "explained"),
    [
        (reports_pb2.MEASURED_FORM_ONNX_ORT, 11, True),
        (reports_pb2.MEASURED_FORM_ONNX_ORT, 22, False),
        (reports_pb2.MEASURED_FORM_ENGINE, 11, False),
    ],
)
def test_convolutions_in_float_are_explained(
    pipeline: coordinator_pb2.Pipeline, form: reports_pb2.MeasuredForm, int8: int, explained: bool
) -> None:
    row = pipeline.results.evaluation.measurements.add(form=form)
    row.int8_layers, row.total_layers = int8, 22
    markdown = report_markdown(pipeline, []).decode()
    assert f"{int8} of 22" in markdown
    assert ("works on codes in float32" in markdown) == explained


def test_pictures_and_diagnostics_lie_in_a_folder_and_are_shown(
    store: ArtifactStore, pipeline: coordinator_pb2.Pipeline
) -> None:
    pipeline.results.synthesis.grid.CopyFrom(store.put_bytes(b"grid"))
    pipeline.results.quantization.diagnostics.CopyFrom(store.put_bytes(b"{ }"))
    pipeline.results.quantization.diagnostics_picture.CopyFrom(store.put_bytes(b"curves"))
    with zipfile.ZipFile(store.local_path(build_report(store, pipeline).bundle.digest)) as bundle:
        folder = {name: bundle.read(name) for name in bundle.namelist() if name.startswith("report/")}
        markdown = bundle.read("report.md").decode()
    assert folder == {
        "report/synthetic_images.png": b"grid",
        "report/diagnostics.json": b"{ }",
        "report/diagnostics.png": b"curves",
    }
    for name in ("synthetic_images", "diagnostics"):
        assert f"](report/{name}.png)" in markdown


def test_named_targets_are_named_in_files_and_report(store: ArtifactStore, pipeline: coordinator_pb2.Pipeline) -> None:
    pipeline.results.engines[0].target.name = "rtx-ada"
    cpu = pipeline.results.engines.add(target=common_pb2.EngineTarget(runtime=common_pb2.RUNTIME_ONNXRUNTIME))
    cpu.target.name = "cpu"
    cpu.graph.CopyFrom(pipeline.results.export.onnx_ort)
    with zipfile.ZipFile(store.local_path(build_report(store, pipeline).bundle.digest)) as bundle:
        assert {"engines/1_rtx-ada.engine", "engines/1_rtx-ada.json"} < set(bundle.namelist())
        markdown = bundle.read("report.md").decode()
    assert "| rtx-ada | tensorrt_rtx 1.7" in markdown
    assert "| cpu | none needed: ONNX Runtime loads model_ort.onnx |" in markdown


def test_engines_are_told_with_their_batches_or_why_not(pipeline: coordinator_pb2.Pipeline) -> None:
    evaluation = pipeline.results.evaluation
    row = evaluation.measurements.add(form=reports_pb2.MEASURED_FORM_ENGINE, target="rtx-ada")
    row.batches.add(batch=8, agreement=100, largest_difference=0.5, latency_ms_mean=2, latency_ms_p50=1.5)
    row.batches[0].images_per_second = 4000
    evaluation.unmeasured.add(target="l4", failure=common_pb2.Failure(message="it needs | a GPU"))
    pipeline.results.engines[0].engine.float_layers.add(name="fc_1", kind="Gemm", reason="the builder chose | gemm")
    markdown = report_markdown(pipeline, []).decode()
    assert "| Engine on a GPU, rtx-ada |" in markdown
    assert "| rtx-ada | 8 | 2.000 | 1.500 | 0.000 | 4,000 | 100.00 | 0.5 |" in markdown
    assert "- Engine l4 was not run: it needs \\| a GPU" in markdown
    assert "- default runtime: fc\\_1 (Gemm) runs in floating point: the builder chose \\| gemm" in markdown


def test_names_from_users_cannot_break_the_table(pipeline: coordinator_pb2.Pipeline) -> None:
    pipeline.spec.display_name = "a | b\n# <script>`"
    first = report_markdown(pipeline, []).decode().splitlines()[0]
    assert first == "# a \\| b \\# \\<script\\>\\`"


def test_a_file_that_is_gone_is_named(store: ArtifactStore, pipeline: coordinator_pb2.Pipeline) -> None:
    pipeline.results.export.onnx_ort.CopyFrom(artifact("9"))
    with pytest.raises(NotFoundError, match="999"):
        build_report(store, pipeline)
