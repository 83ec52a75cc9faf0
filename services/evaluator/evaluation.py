"""Runs the forms of a model over a set, all in one pass, and measures them."""

import math
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from granq.engines.machine import cpu_name, find_gpu
from granq.v1 import artifacts_pb2, evaluator_pb2, reports_pb2
from services.common.datasets import LabelledSet, dataset_artifact, open_dataset
from services.common.errors import InvalidArgumentError
from services.common.jobs import JobContext
from services.evaluator.accuracy import AccuracyMeter
from services.evaluator.cuda import Cuda
from services.evaluator.engine_figures import measure_batches
from services.evaluator.engine_model import EngineModel, require_fit
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
ENGINE = "engine"
_REPEATS_ON_GPU = 10  # times the repeats on the CPU: runs are short there, and a 99th percentile wants many

Batch = tuple[NDArray[np.float32], NDArray[np.int64] | None, NDArray[np.float32] | None]


def evaluate_graphs(request: evaluator_pb2.StartEvaluateRequest, context: JobContext) -> reports_pb2.EvaluationResult:
    """Measure the graphs of a request.

    Every batch is read once and given to all graphs, so that the reference logits are computed once and nothing grows
    with the set. The float model's own reference is the teacher's logits in a synthetic set, and nothing otherwise.

    Raises:
        CancelledError: The job was cancelled.
        FailedPreconditionError: The engine does not run on this machine.
        InvalidArgumentError: A graph or the set is damaged, or they do not fit together.
        NotFoundError: The store does not hold an artifact.
        ResourceExhaustedError: Reading a graph, the set or the engine takes more memory than it may.
    """
    with ExitStack() as stack:
        return _evaluate(request, context, stack)


def _evaluate(
    request: evaluator_pb2.StartEvaluateRequest, context: JobContext, stack: ExitStack
) -> reports_pb2.EvaluationResult:
    settings: EvaluatorSettings = context.settings
    size = request.batch_size if request.HasField("batch_size") else DEFAULT_BATCH
    context.report("loading")
    data: LabelledSet | SyntheticSet
    source = request.WhichOneof("data") or "dataset"
    if source == "synthetic_set":
        with context.reading(source, request.synthetic_set):
            data = SyntheticSet(context.store.local_path(request.synthetic_set.digest))
    else:
        with context.reading(source, dataset_artifact(request.dataset)):
            data = open_dataset(request.dataset, settings.dataset_root, context.store)
    graphs = {field: _load(field, request, context) for field in FORMS if request.HasField(field)}
    models: dict[str, OnnxModel | EngineModel] = {**graphs}
    if request.HasField("engine"):
        models[ENGINE] = _load_engine(request, context, stack)
    first = models["onnx_float"]
    batch_bytes = 4 * size * math.prod(first.input_shape)
    with context.limits(source, batch_bytes):
        data.require(first.input_shape, first.num_classes)
    for field, model in models.items():
        if (model.input_shape, model.num_classes) != (first.input_shape, first.num_classes):
            raise InvalidArgumentError(f"{field} has another input or other classes than onnx_float", field=field)
    meters = {field: AccuracyMeter() for field in models}
    sample: NDArray[np.float32] | None = None
    done = 0
    for images, labels, teacher in context.reading_each(source, _batches(data, size), batch_bytes):
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
        accuracy = meters[field].result()
        if isinstance(model, EngineModel):
            exact = graphs.get("onnx_trt")
            result.measurements.append(_measured_engine(model, exact, accuracy, sample, context))
        else:
            result.measurements.append(_measured(field, model, accuracy, sample, context))
    context.report("timing", len(models), len(models))
    return result


def _load(field: str, request: evaluator_pb2.StartEvaluateRequest, context: JobContext) -> OnnxModel:
    context.check_cancelled()
    artifact: artifacts_pb2.Artifact = getattr(request, field)
    with context.reading(field, artifact):
        graph = load_graph(context.store.local_path(artifact.digest), field)
        return OnnxModel(graph, FORMS[field], context.settings.onnx_threads, field)


def _load_engine(request: evaluator_pb2.StartEvaluateRequest, context: JobContext, stack: ExitStack) -> EngineModel:
    manifest = request.engine
    require_fit(manifest)
    if request.HasField("onnx_trt") and manifest.onnx_digest != request.onnx_trt.digest:
        raise InvalidArgumentError("the engine was built from another graph than onnx_trt", field=ENGINE)
    gpu = Cuda()
    stack.callback(gpu.close)
    with context.reading(ENGINE, manifest.engine):
        model = EngineModel(context.store.local_path(manifest.engine.digest).read_bytes(), manifest, gpu)
    stack.callback(model.close)
    return model


def _batches(data: LabelledSet | SyntheticSet, size: int) -> Iterator[Batch]:
    """Yield (images, true labels or None, teacher logits or None)."""
    if isinstance(data, SyntheticSet):
        for images, teacher in data.batches(size):
            yield images, None, teacher
    else:
        for images, labels in data.images(size):
            yield images, labels, None


def _measured_engine(
    model: EngineModel,
    exact: OnnxModel | None,
    accuracy: reports_pb2.Accuracy,
    sample: NDArray[np.float32],
    context: JobContext,
) -> reports_pb2.Measurement:
    settings: EvaluatorSettings = context.settings
    repeats = settings.latency_repeats * _REPEATS_ON_GPU
    reference = exact.run if exact is not None else None
    batches = measure_batches(model, sample, reference, repeats, settings.latency_seconds, context.check_cancelled)
    tuned = next(batch for batch in batches if batch.batch == model.batch[1])
    found = find_gpu()
    return reports_pb2.Measurement(
        form=reports_pb2.MEASURED_FORM_ENGINE,
        accuracy=accuracy,
        latency_ms_p50=tuned.latency_ms_p50,
        latency_batch=tuned.batch,
        runtime=model.runtime,
        device=found.name if found is not None else "",
        batches=batches,
        device_memory_bytes=model.device_memory_bytes,
    )


def _measured(
    field: str,
    model: OnnxModel,
    accuracy: reports_pb2.Accuracy,
    sample: NDArray[np.float32],
    context: JobContext,
) -> reports_pb2.Measurement:
    settings: EvaluatorSettings = context.settings
    result = reports_pb2.Measurement(
        form=FORMS[field],
        accuracy=accuracy,
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
