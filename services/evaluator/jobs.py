"""What the evaluator's jobs run, in their child processes."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from granq.v1 import common_pb2, evaluator_pb2, jobs_pb2, reports_pb2
from services.common.jobs import JobContext
from services.evaluator.settings import EvaluatorSettings

DEFAULT_BATCH = (1, 8, 64)


def evaluate(request: evaluator_pb2.StartEvaluateRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Run graphs on a set; see evaluation.evaluate_graphs for the errors."""
    # Here, so that a build need not load ONNX Runtime.
    from services.evaluator.evaluation import evaluate_graphs

    return jobs_pb2.JobResult(evaluation=evaluate_graphs(request, context))


def build_engine(request: evaluator_pb2.StartBuildEngineRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Build an engine, audit it, and store it with its manifest.

    Raises:
        CancelledError: The job was cancelled.
        FailedPreconditionError: The runtime is missing, failed or warned, or a convolution came out in float.
        InvalidArgumentError: The graph is damaged or cannot be parsed, or the target is impossible.
        ResourceExhaustedError: The build took too long.
        UnavailableError: The build's process died.
    """
    from services.evaluator import engine_build, manifest, runtimes
    from services.evaluator.build_spec import BuildSpec
    from services.evaluator.graph import load_graph

    start = time.perf_counter()
    settings: EvaluatorSettings = context.settings
    context.report("checking")
    target = request.target
    runtime = runtimes.choose(target)
    source = context.store.local_path(request.onnx_trt.digest)
    graph = load_graph(source, "onnx_trt")
    engine_build.check_graph(graph)
    low, best, high = DEFAULT_BATCH
    batch = target.batch if target.HasField("batch") else common_pb2.BatchProfile(min=low, opt=best, max=high)
    level = target.optimization_level if target.HasField("optimization_level") else 3
    with TemporaryDirectory(prefix="granq-build-") as folder:
        plan = Path(folder, "plan")
        spec = BuildSpec(
            module=runtime.module,
            strong_typing_majors=sorted(runtime.strong_typing_majors),
            onnx=str(source),
            plan=str(plan),
            batch=[batch.min, batch.opt, batch.max],
            capabilities=list(target.compute_capabilities) if runtime.takes_capabilities else [],
            workspace_bytes=target.workspace_bytes if target.HasField("workspace_bytes") else None,
            optimization_level=level if runtime.optimization_levels else None,
        )
        context.report("building")
        outcome = engine_build.run_build(spec, context, settings.build_seconds)
        context.report("auditing")
        engine_build.check_warnings(runtime, outcome.warnings)
        audit = engine_build.check_plan(runtime, graph, plan.read_bytes(), spec.batch)
        if runtime.readable_plan and audit is None:
            context.log.warning("the plan could not be audited", runtime=runtime.module, version=outcome.version)
        context.check_cancelled()
        engine = context.store.put_file(plan, name="model.engine", media_type="application/octet-stream")
    record = manifest.make_manifest(
        engine, request.onnx_trt.digest, runtime, outcome, batch, list(target.compute_capabilities)
    )
    result = reports_pb2.EngineBuildResult(
        manifest=record,
        manifest_file=context.store.put_bytes(
            manifest.to_json(record), name="model.engine.json", media_type="application/json"
        ),
        total_layers=len(graph.layers),
        seconds=time.perf_counter() - start,
    )
    if audit is not None:
        result.int8_layers = audit.int8
    return jobs_pb2.JobResult(engine=result)
