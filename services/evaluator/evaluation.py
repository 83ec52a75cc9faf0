"""Runs the forms of a model over a set, all in one pass, and measures them."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from granq.engines.machine import cpu_name
from granq.v1 import artifacts_pb2, evaluator_pb2, reports_pb2
from services.common.datasets import LabelledSet, open_dataset
from services.common.errors import InvalidArgumentError
from services.common.jobs import JobContext
from services.evaluator.accuracy import AccuracyMeter
from services.evaluator.graph import load_graph
from services.evaluator.latency import median_milliseconds
from services.evaluator.onnx_runtime import RUNTIME, OnnxModel
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.synthetic import SyntheticSet

DEFAULT_BATCH = 64
FORMS = {
    "onnx_float": reports_pb2.MEASURED_FORM_FLOAT,
    "onnx_trt": reports_pb2.MEASURED_FORM_ONNX_TRT,
    "onnx_ort": reports_pb2.MEASURED_FORM_ONNX_ORT,
}
"""Request field and form of each graph; the float model comes first, for it is the others' reference."""

Batch = tuple[NDArray[np.float32], NDArray[np.int64] | None, NDArray[np.float32] | None]


def evaluate_graphs(request: evaluator_pb2.StartEvaluateRequest, context: JobContext) -> reports_pb2.EvaluationResult:
    """Measure the graphs of a request.

    Every batch is read once and given to all graphs, so that the reference logits are computed once and nothing grows
    with the set. The float model's own reference is the teacher's logits in a synthetic set, and nothing otherwise.

    Raises:
        CancelledError: The job was cancelled.
        InvalidArgumentError: A graph or the set is damaged, or they do not fit together.
        NotFoundError: The store does not hold an artifact.
    """
    settings: EvaluatorSettings = context.settings
    size = request.batch_size if request.HasField("batch_size") else DEFAULT_BATCH
    context.report("loading")
    data: LabelledSet | SyntheticSet
    if request.WhichOneof("data") == "synthetic_set":
        data = SyntheticSet(context.store.local_path(request.synthetic_set.digest))
    else:
        data = open_dataset(request.dataset, settings.dataset_root, context.store)
    models = {field: _load(field, request, context) for field in FORMS if request.HasField(field)}
    first = models["onnx_float"]
    data.require(first.input_shape, first.num_classes)
    for field, model in models.items():
        if (model.input_shape, model.num_classes) != (first.input_shape, first.num_classes):
            raise InvalidArgumentError(f"{field} has another input or other classes than onnx_float", field=field)
    meters = {field: AccuracyMeter() for field in models}
    sample: NDArray[np.float32] | None = None
    done = 0
    for images, labels, teacher in _batches(data, size):
        sample = images if sample is None else sample
        reference = teacher
        for field, model in models.items():
            context.check_cancelled()
            logits = model.run(images)
            meters[field].update(logits, labels, reference)
            if field == "onnx_float":
                reference = logits
        done += len(images)
        figures = {f"top1_{field}": meter.top1 for field, meter in meters.items() if labels is not None}
        context.report("evaluating", done, len(data), **figures)
    assert sample is not None  # noqa: S101 - sets are never empty
    result = reports_pb2.EvaluationResult(
        dataset=data.description if isinstance(data, LabelledSet) else "synthetic",
    )
    for number, (field, model) in enumerate(models.items()):
        context.report("timing", number, len(models))
        result.measurements.append(_measured(field, model, meters[field], sample, context))
    context.report("timing", len(models), len(models))
    return result


def _load(field: str, request: evaluator_pb2.StartEvaluateRequest, context: JobContext) -> OnnxModel:
    context.check_cancelled()
    artifact: artifacts_pb2.Artifact = getattr(request, field)
    graph = load_graph(context.store.local_path(artifact.digest), field)
    return OnnxModel(graph, FORMS[field], context.settings.onnx_threads, field)


def _batches(data: LabelledSet | SyntheticSet, size: int) -> Iterator[Batch]:
    """Yield (images, true labels or None, teacher logits or None)."""
    if isinstance(data, SyntheticSet):
        for images, teacher in data.batches(size):
            yield images, None, teacher
    else:
        for images, labels in data.images(size):
            yield images, labels, None


def _measured(
    field: str, model: OnnxModel, meter: AccuracyMeter, sample: NDArray[np.float32], context: JobContext
) -> reports_pb2.Measurement:
    settings: EvaluatorSettings = context.settings
    result = reports_pb2.Measurement(
        form=FORMS[field],
        accuracy=meter.result(),
        latency_ms_p50=median_milliseconds(
            lambda: model.run(sample), settings.latency_repeats, settings.latency_seconds, context.check_cancelled
        ),
        latency_batch=len(sample),
        runtime=RUNTIME,
        device=cpu_name(),
    )
    if model.kernels is not None:
        result.int8_layers, result.total_layers = model.kernels.int8, model.kernels.total
    return result
