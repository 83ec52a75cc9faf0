"""Carries out the stages of pipelines: the body of the workflow's steps.

A step may run again after a crash, so every stage is built to be repeated: a stage whose result is stored does nothing,
jobs attach by id, artifacts are named by their content, and writes of a lost attempt are refused.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sqlalchemy.exc import DBAPIError
from structlog.contextvars import bound_contextvars

from granq.v1 import common_pb2, coordinator_pb2, jobs_pb2, reports_pb2
from services.common import tracing
from services.common.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    GranqError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    to_failure,
)
from services.common.logs import get_logger
from services.coordinator.calls import DatabaseCalls
from services.coordinator.engine import CONTINUE
from services.coordinator.measurements import engine_rows, merge_evaluations, part_of
from services.coordinator.metrics import FAILURES, STAGE_SECONDS, observe_evaluation, reason_label
from services.coordinator.pipeline_jobs import PipelineJobs
from services.coordinator.repository import Repository, Snapshot
from services.coordinator.requests import NAMES, STAGES, JobCall, Stage, applies, needs_engine, stage_calls
from services.coordinator.threads import Threads
from services.coordinator.together import together
from services.coordinator.transitions import SupersededError, Transitions, now_us

SUPERSEDED = "superseded"
FAILED = "failed"
# What may be wrong with an engine or the GPU that it would run on, without harm to what else is measured.
_OF_THE_ENGINE = (FailedPreconditionError, InternalError, InvalidArgumentError, ResourceExhaustedError)

BuildReport = Callable[[coordinator_pb2.Pipeline], coordinator_pb2.PipelineResults]

log = get_logger(__name__)


class PipelineDriver:
    """Runs one stage of one pipeline at a time; holds no state of its own.

    Args:
        repository: Stored pipelines.
        transitions: Changes of their state.
        calls: Run calls of the database.
        jobs: Run the stages' jobs.
        build_report: Makes the results of the REPORT stage; blocking.
        report_threads: Where it runs.
    """

    def __init__(
        self,
        *,
        repository: Repository,
        transitions: Transitions,
        calls: DatabaseCalls,
        jobs: PipelineJobs,
        build_report: BuildReport,
        report_threads: Threads,
    ) -> None:
        self._repository = repository
        self._transitions = transitions
        self._calls = calls
        self._jobs = jobs
        self._build_report = build_report
        self._report_threads = report_threads

    async def run_stage(self, pipeline_id: str, attempt: int, stage: int) -> str:
        """Carry out a stage and store its result, or the failure.

        Returns:
            `CONTINUE` when the next stage may run, else why the workflow ends.
        """
        trace = tracing.pipeline_trace(pipeline_id, attempt)
        with (
            bound_contextvars(pipeline_id=pipeline_id, stage=NAMES[stage]),
            tracing.span(f"stage {NAMES[stage]}", trace, granq_pipeline_id=pipeline_id) as span,
        ):
            began = time.monotonic()
            try:
                outcome = await self._try_stage(pipeline_id, attempt, stage)
            except SupersededError:
                return SUPERSEDED
            except DBAPIError:
                # Nothing can be written, not even a failure. The sweeper drives the pipeline anew later.
                log.exception("the database refused a write")
                raise
            if outcome is not None:
                seconds = time.monotonic() - began
                STAGE_SECONDS.labels(NAMES[stage], outcome).observe(seconds, tracing.exemplar(pipeline_id=pipeline_id))
                tracing.note_outcome(span, outcome)
            return FAILED if outcome == FAILED else CONTINUE

    async def _try_stage(self, pipeline_id: str, attempt: int, stage: int) -> str | None:
        try:
            snapshot = await self._calls.insist(self._repository.get, pipeline_id)
        except NotFoundError as error:
            raise SupersededError(f"pipeline {pipeline_id} was deleted") from error
        pipeline = snapshot.pipeline
        if not applies(stage, pipeline.spec):
            return None
        if not await self._calls.insist(self._transitions.enter_stage, pipeline_id, attempt, stage):
            return None
        log.info("stage begins", attempt=attempt)
        try:
            async with _until(snapshot):
                part = await self._work(pipeline, attempt, stage)
            last = stage == STAGES[-1][0]
            await self._calls.insist(self._transitions.finish_stage, pipeline_id, attempt, stage, part, last=last)
        except (SupersededError, DBAPIError):
            raise
        except Exception as error:
            if isinstance(error, GranqError):
                log.warning("stage failed", reason=error.reason, error=error.message)
            else:
                log.exception("stage failed unexpectedly")
            failure = to_failure(error)
            await self._calls.insist(self._transitions.fail, pipeline_id, attempt, failure)
            FAILURES.labels(NAMES[stage], reason_label(failure.reason)).inc()
            await self._jobs.stop(pipeline_id)
            return FAILED
        if part.HasField("evaluation"):
            observe_evaluation(part.evaluation)
        log.info("stage ends")
        return "succeeded"

    async def _work(
        self, pipeline: coordinator_pb2.Pipeline, attempt: int, stage: int
    ) -> coordinator_pb2.PipelineResults:
        calls = stage_calls(stage, pipeline)
        match stage:
            case Stage.STAGE_REPORT:
                return await self._report_threads.call(self._build_report, pipeline)
            case Stage.STAGE_BUILD_ENGINES:
                return await self._engines(pipeline, attempt, calls)
            case Stage.STAGE_EVALUATE:
                return await self._evaluate(pipeline, attempt, calls)
            case _:
                (call,) = calls
                return part_of(await self._jobs.run(pipeline.pipeline_id, attempt, call, asyncio.Lock()))

    async def _engines(
        self, pipeline: coordinator_pb2.Pipeline, attempt: int, calls: list[JobCall]
    ) -> coordinator_pb2.PipelineResults:
        pending = iter(calls)
        # Where they share a machine they run one after the other: a builder times kernels, and a simulation or another
        # build beside it would falsify what it, or what a measurement, finds.
        alone = asyncio.Lock()
        part = coordinator_pb2.PipelineResults()
        part.engines.extend(
            await together(
                self._engine(pipeline, attempt, target, next(pending) if needs_engine(target) else None, alone)
                for target in pipeline.spec.engines
            )
        )
        return part

    async def _engine(
        self,
        pipeline: coordinator_pb2.Pipeline,
        attempt: int,
        target: common_pb2.EngineTarget,
        call: JobCall | None,
        alone: asyncio.Lock,
    ) -> coordinator_pb2.EngineOutcome:
        outcome = coordinator_pb2.EngineOutcome(target=target)
        if call is None:
            outcome.graph.CopyFrom(pipeline.results.export.onnx_ort)
            return outcome
        try:
            result = await self._jobs.run(pipeline.pipeline_id, attempt, call, alone)
        except FailedPreconditionError as error:
            # Nobody has what this target needs. The ONNX files are still worth having, so go on.
            log.warning("engine not built", reason=error.reason, error=error.message)
            outcome.failure.CopyFrom(to_failure(error))
        else:
            outcome.engine.CopyFrom(_expect(result, "engine", call).engine)
        return outcome

    async def _evaluate(
        self, pipeline: coordinator_pb2.Pipeline, attempt: int, calls: list[JobCall]
    ) -> coordinator_pb2.PipelineResults:
        found: dict[str, reports_pb2.EvaluationResult] = {}
        engines = reports_pb2.EvaluationResult()
        alone = asyncio.Lock()  # as above
        measured = await together(self._measure(pipeline.pipeline_id, attempt, call, alone) for call in calls)
        for call, evaluation in zip(calls, measured, strict=True):
            if isinstance(evaluation, common_pb2.Failure):
                engines.unmeasured.add(target=call.engine, failure=evaluation)
            elif call.engine:
                engines.measurements.extend(engine_rows(evaluation, call.engine))
            else:
                found[call.worker] = evaluation
        merged = merge_evaluations(found.get("evaluator"), found.get("quantizer"), pipeline.results.quantization)
        merged.MergeFrom(engines)
        return coordinator_pb2.PipelineResults(evaluation=merged)

    async def _measure(
        self, pipeline_id: str, attempt: int, call: JobCall, alone: asyncio.Lock
    ) -> reports_pb2.EvaluationResult | common_pb2.Failure:
        try:
            result = await self._jobs.run(pipeline_id, attempt, call, alone)
        except _OF_THE_ENGINE as error:
            if not call.engine:
                raise
            # What could be measured of the graphs is still worth having.
            log.warning("engine not measured", reason=error.reason, error=error.message)
            return to_failure(error)
        return _expect(result, "evaluation", call).evaluation


def overdue(spec: coordinator_pb2.PipelineSpec) -> DeadlineExceededError:
    """Return the error of a pipeline that did not end in time."""
    return DeadlineExceededError(
        f"the pipeline did not end within its max_duration of {spec.max_duration.ToSeconds()} s; retry it to go on for "
        "as long again, or submit it with more time",
        reason="PIPELINE_DEADLINE",
        field="spec.max_duration",
    )


@asynccontextmanager
async def _until(snapshot: Snapshot) -> AsyncIterator[None]:
    """End what is within when the pipeline's time is up, with DeadlineExceededError."""
    left = None if snapshot.deadline is None else (snapshot.deadline - now_us()) / 1e6
    try:
        async with asyncio.timeout(left) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise overdue(snapshot.pipeline.spec) from None


def _expect(result: jobs_pb2.JobResult, kind: str, call: JobCall) -> jobs_pb2.JobResult:
    if result.WhichOneof("result") != kind:
        raise InternalError(f"the {call.worker} returned {result.WhichOneof('result')} for job {call.job_id}")
    return result
