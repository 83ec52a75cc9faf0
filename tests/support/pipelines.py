"""Specs, results and stored pipelines for the coordinator's tests."""

from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine

from granq.v1 import artifacts_pb2, common_pb2, coordinator_pb2, jobs_pb2, reports_pb2
from services.common.artifacts import ArtifactStore
from services.coordinator.database import database_engine, parse_url, prepare_database
from services.coordinator.repository import Repository
from services.coordinator.transitions import Transitions

ME = "coordinator-under-test"


def artifact(letter: str = "a", size: int = 0) -> artifacts_pb2.Artifact:
    """Return an artifact that no store holds."""
    return artifacts_pb2.Artifact(digest="sha256:" + letter * 64, size_bytes=size)


def spec(model: artifacts_pb2.Artifact | None = None, name: str = "test") -> coordinator_pb2.PipelineSpec:
    """Return the spec of a W4A4 ResNet-20 without dataset and engines."""
    return coordinator_pb2.PipelineSpec(
        model=common_pb2.ModelSource(artifact=model or artifact(), architecture="resnet20", input_shape=[3, 32, 32]),
        quantization=common_pb2.QuantizationConfig(weight_bits=4, activation_bits=4),
        display_name=name,
    )


def results(store: ArtifactStore) -> coordinator_pb2.PipelineResults:
    """Return plausible results of all stages up to EVALUATE, with one engine built and one refused."""
    put = store.put_bytes
    export = reports_pb2.ExportResult(
        onnx_trt=put(b"trt" * 1000),
        onnx_ort=put(b"ort"),
        onnx_float=put(b"float"),
        package=put(b"package"),
        exact=True,
        packed_bytes=140_000,
    )
    manifest = reports_pb2.EngineManifest(
        engine=put(b"engine"), runtime=common_pb2.RUNTIME_TENSORRT_RTX, runtime_version="1.7", platform="linux-x86_64"
    )
    built = reports_pb2.EngineBuildResult(manifest=manifest, manifest_file=put(b"{}"), total_layers=20, seconds=3)
    refused = common_pb2.Failure(code=9, reason="RUNTIME_MISSING", message="install tensorrt | now")
    return coordinator_pb2.PipelineResults(
        model=reports_pb2.ModelSummary(input_shape=[3, 32, 32], num_classes=10, parameters=270_000),
        synthesis=reports_pb2.SynthesisResult(dataset=put(b"images"), num_images=1024, bn_loss=1.5),
        quantization=reports_pb2.QuantizationResult(
            model=put(b"quantized"), iterations=800, loss=0.25, teacher_agreement=0.97, seconds=61, device="cpu"
        ),
        export=export,
        engines=[
            coordinator_pb2.EngineOutcome(engine=built),
            coordinator_pb2.EngineOutcome(failure=refused),
        ],
        evaluation=reports_pb2.EvaluationResult(
            dataset="fashion",
            measurements=[
                measurement(reports_pb2.MEASURED_FORM_FLOAT, 93.84),
                measurement(reports_pb2.MEASURED_FORM_ONNX_ORT, 93.1),
            ],
        ),
    )


def measurement(form: reports_pb2.MeasuredForm, top1: float) -> reports_pb2.Measurement:
    """Return one row of an evaluation."""
    return reports_pb2.Measurement(form=form, accuracy=reports_pb2.Accuracy(images=10_000, top1=top1), device="cpu")


def progress(step: int, phase: str = "training", total: int = 100) -> jobs_pb2.Progress:
    """Return a progress."""
    return jobs_pb2.Progress(phase=phase, step=step, total=total)


class Database:
    """An opened database with both of its faces."""

    def __init__(self, url: str, changed: Callable[[str], None] = lambda _pipeline_id: None) -> None:
        self.url = parse_url(url)
        self.engine: Engine = database_engine(self.url)
        prepare_database(self.engine)
        self.repository = Repository(self.engine)
        self.transitions = Transitions(self.engine, changed)

    def create(self, request_id: str = "", name: str = "test") -> str:
        """Store a queued pipeline and return its id."""
        return self.repository.create(spec(name=name), request_id, ME)[0].pipeline_id

    def sequences(self, pipeline_id: str) -> list[int]:
        """Return the numbers of all events."""
        return [event.sequence for event in self.repository.events(pipeline_id, 0, 100_000)]

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def sqlite_url(folder: Path) -> str:
    """Return the URL of a database in a folder."""
    return f"sqlite:///{folder / 'coordinator.sqlite'}"
