"""Carries out the stages of pipelines: the body of the workflow's steps.

A step may run again after a crash, so every stage is built to be repeated: a stage whose result is stored does nothing,
jobs attach by id, artifacts are named by their content, and writes of a lost attempt are refused.
"""

import time
from collections.abc import Callable

from sqlalchemy.exc import DBAPIError
from structlog.contextvars import bound_contextvars

from granq.v1 import common_pb2, coordinator_pb2, jobs_pb2, reports_pb2
from services.common.errors import (
    FailedPreconditionError,
    GranqError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    to_failure,
)
from services.common.logs import get_logger
from services.coordinator.calls import DatabaseCalls
from services.coordinator.engine import CONTINUE
from services.coordinator.measurements import engine_rows, merge_evaluations, part_of
from services.coordinator.metrics import FAILURES, JOB_RETRIES, STAGE_SECONDS, observe_evaluation, reason_label
from services.coordinator.relay import ProgressRelay
from services.coordinator.repository import Repository
from services.coordinator.requests import NAMES, STAGES, JobCall, Stage, applies, needs_engine, stage_calls
from services.coordinator.runner import JobRunner, Patience
from services.coordinator.threads import Threads
from services.coordinator.transitions import JobCursor, SupersededError, Transitions
from services.coordinator.workers import Workers

SUPERSEDED = "superseded"
FAILED = "failed"
_STOP_SECONDS = 2.0
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
        workers: Where jobs run.
        build_report: Makes the results of the REPORT stage; blocking.
        report_threads: Where it runs.
        patience: Limits of retries.
    """

    def __init__(
        self,
        *,
        repository: Repository,
        transitions: Transitions,
        calls: DatabaseCalls,
        workers: Workers,
        build_report: BuildReport,
        report_threads: Threads,
        patience: Patience,
    ) -> None:
        self._repository = repository
        self._transitions = transitions
        self._calls = calls
        self._workers = workers
        self._build_report = build_report
        self._report_threads = report_threads
        self._patience = patience

    async def run_stage(self, pipeline_id: str, attempt: int, stage: int) -> str:
        """Carry out a stage and store its result, or the failure.

        Returns:
            `CONTINUE` when the next stage may run, else why the workflow ends.
        """
        with bound_contextvars(pipeline_id=pipeline_id, stage=NAMES[stage]):
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
                STAGE_SECONDS.labels(NAMES[stage], outcome).observe(seconds, {"pipeline_id": pipeline_id})
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
            await self._stop_jobs(pipeline_id)
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
                return part_of(await self._job(pipeline.pipeline_id, attempt, call))

    async def _engines(
        self, pipeline: coordinator_pb2.Pipeline, attempt: int, calls: list[JobCall]
    ) -> coordinator_pb2.PipelineResults:
        part = coordinator_pb2.PipelineResults()
        # One after the other: the builder times kernels, and a second build on the same device would falsify them.
        pending = iter(calls)
        for target in pipeline.spec.engines:
            outcome = part.engines.add(target=target)
            if not needs_engine(target):
                outcome.graph.CopyFrom(pipeline.results.export.onnx_ort)
                continue
            call = next(pending)
            try:
                result = await self._job(pipeline.pipeline_id, attempt, call)
            except FailedPreconditionError as error:
                # The evaluator lacks what this target needs. The ONNX files are still worth having, so go on.
                log.warning("engine not built", reason=error.reason, error=error.message)
                outcome.failure.CopyFrom(to_failure(error))
            else:
                outcome.engine.CopyFrom(_expect(result, "engine", call).engine)
        return part

    async def _evaluate(
        self, pipeline: coordinator_pb2.Pipeline, attempt: int, calls: list[JobCall]
    ) -> coordinator_pb2.PipelineResults:
        found: dict[str, reports_pb2.EvaluationResult] = {}
        # One after the other: where both workers share a machine, the simulation would falsify the graphs' latency.
        engines = reports_pb2.EvaluationResult()
        for call in calls:
            try:
                result = await self._job(pipeline.pipeline_id, attempt, call)
            except _OF_THE_ENGINE as error:
                if not call.engine:
                    raise
                # What could be measured of the graphs is still worth having.
                log.warning("engine not measured", reason=error.reason, error=error.message)
                engines.unmeasured.add(target=call.engine, failure=to_failure(error))
                continue
            evaluation = _expect(result, "evaluation", call).evaluation
            if call.engine:
                engines.measurements.extend(engine_rows(evaluation, call.engine))
            else:
                found[call.worker] = evaluation
        merged = merge_evaluations(found.get("evaluator"), found.get("quantizer"), pipeline.results.quantization)
        merged.MergeFrom(engines)
        return coordinator_pb2.PipelineResults(evaluation=merged)

    async def _job(self, pipeline_id: str, attempt: int, call: JobCall) -> jobs_pb2.JobResult:
        async def write(progress: jobs_pb2.Progress, cursor: JobCursor) -> None:
            await self._calls.insist(
                self._transitions.record_progress, pipeline_id, attempt, progress, call.job_id, cursor
            )

        async def announce(cause: common_pb2.Failure) -> None:
            JOB_RETRIES.labels(call.worker, reason_label(cause.reason)).inc()
            await self._calls.insist(self._transitions.record_trouble, pipeline_id, attempt, cause)

        async def check() -> None:
            await self._calls.insist(self._transitions.check_owned, pipeline_id, attempt)

        cursor = await self._calls.insist(self._repository.open_job, pipeline_id, call.job_id, call.worker)
        async with ProgressRelay(write, call.label) as relay:
            runner = JobRunner(self._workers, call, self._patience, relay, announce, check, cursor)
            try:
                result = await runner.run()
            except UnavailableError:
                raise  # the job may still run, or run again
            except GranqError:
                await self._calls.insist(self._repository.close_job, pipeline_id, call.job_id)
                raise
        await self._calls.insist(self._repository.close_job, pipeline_id, call.job_id)
        return result

    async def _stop_jobs(self, pipeline_id: str) -> None:
        """Ask the jobs of a failed pipeline that may still run to end; a worker that is away is left alone."""
        for job in await self._calls.insist(self._repository.open_jobs, pipeline_id):
            try:
                await self._workers.cancel(job.worker, job.job_id, _STOP_SECONDS)
            except GranqError as error:
                log.info("job not cancelled", job_id=job.job_id, error=error.message)
            await self._calls.insist(self._repository.close_job, pipeline_id, job.job_id)


def _expect(result: jobs_pb2.JobResult, kind: str, call: JobCall) -> jobs_pb2.JobResult:
    if result.WhichOneof("result") != kind:
        raise InternalError(f"the {call.worker} returned {result.WhichOneof('result')} for job {call.job_id}")
    return result
