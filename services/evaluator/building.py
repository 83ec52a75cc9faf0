"""One engine build from graph to audited plan, wherever it runs: in a job, or on a device from its package."""

from dataclasses import dataclass
from pathlib import Path

from granq.engines.target import fault_of
from granq.v1 import artifacts_pb2, common_pb2, reports_pb2
from services.common.errors import InvalidArgumentError
from services.evaluator import engine_build, runtimes
from services.evaluator.build_spec import BuildOutcome, BuildSpec
from services.evaluator.engine_build import Follower
from services.evaluator.graph import Graph, load_graph
from services.evaluator.manifest import make_manifest
from services.evaluator.plan_audit import PlanAudit
from services.evaluator.runtimes import EngineRuntime
from services.evaluator.timing_cache import CacheStore, cache_name_of, fetch_cache, keep_cache

DEFAULT_BATCH = (1, 8, 64)
DEFAULT_OPTIMIZATION_LEVEL = 3


@dataclass(frozen=True)
class BuiltPlan:
    """A plan that was built and audited.

    Attributes:
        runtime: What built it.
        graph: What it was built from.
        target: What it was built for.
        batch: Its batch profile.
        outcome: What the build reported.
        audit: Which layers run in INT8; None where the plan does not tell.
    """

    runtime: EngineRuntime
    graph: Graph
    target: common_pb2.EngineTarget
    batch: common_pb2.BatchProfile
    outcome: BuildOutcome
    audit: PlanAudit | None

    def manifest(self, engine: artifacts_pb2.Artifact, onnx_digest: str) -> reports_pb2.EngineManifest:
        """Return the engine's manifest, for the plan as it was stored and the graph's digest."""
        capabilities = list(self.target.compute_capabilities)
        return make_manifest(engine, onnx_digest, self.runtime, self.outcome, self.batch, capabilities)


def build_plan(
    source: Path,
    field: str,
    target: common_pb2.EngineTarget,
    plan: Path,
    follower: Follower,
    seconds: float,
    caches: CacheStore | None = None,
) -> BuiltPlan:
    """Build an engine in a process of its own, and audit it.

    Args:
        source: The ONNX file with signed codes.
        field: What named it, for errors.
        target: What to build for.
        plan: File to write the engine to.
        follower: Gets the progress, and may stop the build.
        seconds: Time after which the build has failed.
        caches: Where timing caches are kept from build to build; None to keep none.

    Raises:
        CancelledError: The follower stopped it.
        FailedPreconditionError: The runtime is missing, failed or warned, or a convolution came out in float.
        InvalidArgumentError: The graph is damaged or cannot be parsed, or the target is impossible.
        ResourceExhaustedError: The build took too long.
        UnavailableError: The build's process died.
    """
    follower.report("checking")
    if (fault := fault_of(target)) is not None:
        raise InvalidArgumentError(f"target.{fault[0]} {fault[1]}", field=f"target.{fault[0]}")
    runtime = runtimes.choose(target)
    graph = load_graph(source, field)
    engine_build.check_graph(graph)
    low, best, high = DEFAULT_BATCH
    batch = target.batch if target.HasField("batch") else common_pb2.BatchProfile(min=low, opt=best, max=high)
    level = target.optimization_level if target.HasField("optimization_level") else DEFAULT_OPTIMIZATION_LEVEL
    cache_name = cache_name_of(runtime) if caches is not None else None
    cache = plan.with_name("timing.cache")
    if caches is not None and cache_name is not None:
        fetch_cache(caches, cache_name, cache)
    spec = BuildSpec(
        module=runtime.module,
        strong_typing_majors=sorted(runtime.strong_typing_majors),
        onnx=str(source),
        plan=str(plan),
        batch=[batch.min, batch.opt, batch.max],
        capabilities=list(target.compute_capabilities) if runtime.takes_capabilities else [],
        workspace_bytes=target.workspace_bytes if target.HasField("workspace_bytes") else None,
        optimization_level=level if runtime.optimization_levels else None,
        timing_cache=str(cache) if cache_name is not None else None,
        layers=str(plan.with_name("layers.json")) if runtime.inspector else None,
    )
    follower.report("building")
    outcome = engine_build.run_build(spec, follower, seconds)
    follower.report("auditing")
    for warning, reason in engine_build.check_warnings(runtime, outcome.warnings).items():
        follower.log.info("the builder warned", warning=warning, harmless=reason)
    audit = engine_build.check_plan(runtime, graph, spec)
    if audit is None:
        follower.log.warning("the engine could not be audited", runtime=runtime.module, version=outcome.version)
    follower.check_cancelled()
    if caches is not None and cache_name is not None and cache.exists():
        keep_cache(caches, cache_name, cache)
    return BuiltPlan(runtime, graph, target, batch, outcome, audit)
