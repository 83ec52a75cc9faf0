"""What the evaluator's jobs run, in their child processes."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from granq.v1 import evaluator_pb2, jobs_pb2, reports_pb2
from services.common.jobs import JobContext
from services.common.jobs.reading import fetched
from services.evaluator.settings import EvaluatorSettings


def evaluate(request: evaluator_pb2.StartEvaluateRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Run graphs on a set; see evaluation.evaluate_graphs for the errors."""
    # Here, so that a build need not load ONNX Runtime.
    from services.evaluator.evaluation import evaluate_graphs

    return jobs_pb2.JobResult(evaluation=evaluate_graphs(request, context))


def build_engine(request: evaluator_pb2.StartBuildEngineRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Build an engine, audit it, and store it with its manifest.

    Raises:
        CancelledError: The job was cancelled.
        DataLossError: The stored bytes of the graph do not match its digest.
        FailedPreconditionError: The runtime is missing, failed or warned, or a convolution came out in float.
        InvalidArgumentError: The graph is damaged or cannot be parsed, or the target is impossible.
        NotFoundError: The store does not hold the graph.
        ResourceExhaustedError: The build took too long.
        UnavailableError: The build's process died.
    """
    from services.evaluator.building import build_plan
    from services.evaluator.manifest import to_json

    start = time.perf_counter()
    settings: EvaluatorSettings = context.settings
    source = fetched(context.store, "onnx_trt", request.onnx_trt)
    with TemporaryDirectory(prefix="granq-build-") as folder:
        plan = Path(folder, "plan")
        built = build_plan(source, "onnx_trt", request.target, plan, context, settings.build_seconds, context.store)
        engine = context.store.put_file(plan, name="model.engine", media_type="application/octet-stream")
    record = built.manifest(engine, request.onnx_trt.digest)
    result = reports_pb2.EngineBuildResult(
        manifest=record,
        manifest_file=context.store.put_bytes(to_json(record), name="model.engine.json", media_type="application/json"),
        total_layers=len(built.graph.layers),
        seconds=time.perf_counter() - start,
    )
    if built.audit is not None:
        result.int8_layers = built.audit.int8
        for found in built.audit.floats:
            result.float_layers.add(name=found.layer.name, kind=found.layer.kind, reason=found.reason)
    return jobs_pb2.JobResult(engine=result)
