"""What jobs found out becomes figures, with labels that no user chooses."""

from prometheus_client import REGISTRY

from granq.v1 import artifacts_pb2, common_pb2, jobs_pb2, reports_pb2
from services.evaluator.metrics import observe


def figure(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def test_a_built_engine() -> None:
    before = figure("granq_engine_build_seconds_count", runtime="tensorrt_rtx") or 0.0
    quick = figure("granq_engine_build_seconds_bucket", runtime="tensorrt_rtx", le="15.0") or 0.0
    manifest = reports_pb2.EngineManifest(
        engine=artifacts_pb2.Artifact(size_bytes=1000), runtime=common_pb2.RUNTIME_TENSORRT_RTX
    )
    built = reports_pb2.EngineBuildResult(manifest=manifest, int8_layers=9, total_layers=10, seconds=30)
    observe(jobs_pb2.JobResult(engine=built))
    assert figure("granq_engine_build_seconds_count", runtime="tensorrt_rtx") == before + 1
    assert figure("granq_engine_build_seconds_bucket", runtime="tensorrt_rtx", le="15.0") == quick
    assert figure("granq_engine_int8_layers_ratio", runtime="tensorrt_rtx") == 0.9
    assert figure("granq_engine_size_bytes", runtime="tensorrt_rtx") == 1000


def test_measured_forms() -> None:
    graph = reports_pb2.Measurement(
        form=reports_pb2.MEASURED_FORM_ONNX_ORT,
        accuracy=reports_pb2.Accuracy(images=100, top1=93.5, agreement=97.0),
        latency_ms_p50=20.0,
        latency_batch=64,
        int8_layers=22,
        total_layers=22,
    )
    engine = reports_pb2.Measurement(
        form=reports_pb2.MEASURED_FORM_ENGINE,
        accuracy=reports_pb2.Accuracy(images=100, agreement=98.0),
        latency_ms_p50=0.5,
        latency_batch=8,
        batches=[
            reports_pb2.BatchMeasurement(batch=1, images_per_second=1000),
            reports_pb2.BatchMeasurement(batch=8, images_per_second=15000),
        ],
    )
    observe(jobs_pb2.JobResult(evaluation=reports_pb2.EvaluationResult(measurements=[graph, engine])))
    assert figure("granq_measured_latency_seconds", form="onnx_ort") == 0.02
    assert figure("granq_measured_images_per_second", form="onnx_ort") == 3200
    assert figure("granq_measured_top1_ratio", form="onnx_ort") == 0.935
    assert figure("granq_measured_int8_layers_ratio", form="onnx_ort") == 1
    assert figure("granq_measured_images_per_second", form="engine") == 15000
    assert figure("granq_measured_agreement_ratio", form="engine") == 0.98
    assert figure("granq_measured_top1_ratio", form="engine") is None


def test_other_results_are_none_of_its_business() -> None:
    observe(jobs_pb2.JobResult(inspection=reports_pb2.ModelSummary(num_classes=10)))
    observe(jobs_pb2.JobResult())
