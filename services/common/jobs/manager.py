"""Begins, follows and ends the jobs of one worker."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping

from google.protobuf.message import Message

from granq.v1 import jobs_pb2
from services.common import metrics, tracing
from services.common.artifacts import ArtifactStore
from services.common.errors import (
    WORKER_BUSY,
    CancelledError,
    GranqError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    as_granq_error,
)
from services.common.jobs.process import JobProcess
from services.common.jobs.records import JobRecords, other_request, request_digest
from services.common.jobs.run import ActiveRun, Run
from services.common.jobs.usage import Usage
from services.common.logs import get_logger
from services.common.settings import ServerSettings
from services.common.slots import Slots

_MAX_ACTIVE = 1024
_MAX_HELD = 128
_log = get_logger("services.common.jobs")


class JobManager:
    """The jobs of one server. Used from one event loop, whose thread must outlive the jobs.

    Args:
        store: The artifact store, which also keeps requests, checkpoints and results of jobs.
        settings: The service's settings; the jobs' processes get them too.
        kinds: Job function of each kind, as a dotted path such as "services.quantizer.jobs:quantize".
        max_running: Jobs that run at once; more wait, by their priority.
        kill_after: Seconds that a cancelled job has to notice, before its process is killed.
        on_success: Told the result of each run that ended with one.

    Attributes:
        usage: Whether jobs are started, wait, run, or are watched; whatever else keeps the worker busy joins in.
    """

    def __init__(
        self,
        store: ArtifactStore,
        settings: ServerSettings,
        kinds: Mapping[str, str],
        max_running: int,
        kill_after: float = 3.0,
        on_success: Callable[[jobs_pb2.JobResult], None] = lambda _result: None,
    ) -> None:
        self._settings = settings
        self._kinds = dict(kinds)
        for kind in kinds:
            metrics.show_jobs(kind)
        self._kill_after = kill_after
        self._on_success = on_success
        self._records = JobRecords(store)
        self._pipeline_id: str | None = None
        self._slots = Slots(max_running)
        self.usage = Usage()
        self._runs: dict[str, Run] = {}
        self._active: dict[Run, ActiveRun] = {}
        # Two equal starts at once must not begin two runs.
        self._lock = asyncio.Lock()
        self._closing = False

    async def start(self, kind: str, key: jobs_pb2.JobKey, request: Message) -> jobs_pb2.Job:
        """Begin a job, attach to the one that runs, or return the one that succeeded; resume one that did not.

        One that was cancelled and has not ended yet is resumed as soon as it has.

        Raises:
            AlreadyExistsError: The id belongs to another request.
            ResourceExhaustedError: Too many jobs wait, or it works for another pipeline; reason WORKER_BUSY.
            UnavailableError: The server is about to end, or the store cannot be reached.
        """
        digest = request_digest(kind, request)
        with self.usage.used():
            while True:
                async with self._lock:
                    ending = self._ending(key.job_id, digest)
                    if ending is None:
                        return await self._start(kind, key, request, digest)
                # Whoever starts a job that was cancelled a moment ago wants it to go on, not to hear of its end.
                await asyncio.wait((ending,))

    def _ending(self, job_id: str, digest: str) -> asyncio.Task[None] | None:
        """Return the task of a run of this job that was cancelled and has not ended."""
        run = self._runs.get(job_id)
        active = self._active.get(run) if run is not None and run.cancelling and run.digest == digest else None
        return None if active is None else active.task

    async def _start(self, kind: str, key: jobs_pb2.JobKey, request: Message, digest: str) -> jobs_pb2.Job:
        run = await self._find(key.job_id)
        if run is not None and run.digest != digest:
            raise other_request(key.job_id)
        if run is not None and not run.restartable:
            return run.snapshot()
        if self._closing:
            raise self._stopping()
        if len(self._active) >= _MAX_ACTIVE:
            raise ResourceExhaustedError(f"{_MAX_ACTIVE} jobs are here already; try later", reason=WORKER_BUSY)
        if self._settings.single_pipeline and self._pipeline_id not in (None, key.pipeline_id):
            raise ResourceExhaustedError("this worker has another pipeline; try later", reason=WORKER_BUSY)
        await asyncio.to_thread(self._records.claim, key.job_id, digest)
        self._pipeline_id = key.pipeline_id
        self._runs.pop(key.job_id, None)
        run = self._runs[key.job_id] = Run(kind, key, digest)
        active = self._active[run] = ActiveRun()
        active.task = asyncio.create_task(self._traced(run, active, request), name=f"job {key.job_id}")
        self._forget_oldest()
        return run.snapshot()

    async def get(self, job_id: str) -> jobs_pb2.Job:
        """Return a job as it is now, or raise NotFoundError."""
        return (await self._require(job_id)).snapshot()

    def list(self) -> list[jobs_pb2.Job]:
        """Return the jobs that this server holds, newest first."""
        return [run.snapshot() for run in sorted(self._runs.values(), key=lambda run: run.created_ns, reverse=True)]

    async def watch(
        self, job_id: str, after_sequence: int = 0, run_id: str = ""
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        """Yield a job's events after a number, as they come, until it has ended.

        Raises:
            NotFoundError: There is no such job.
            UnavailableError: The server ends before the job does.
        """
        with self.usage.used():
            run = await self._require(job_id)
            async for event in run.watch(after_sequence, run_id, self._stopping()):
                yield event

    async def cancel(self, job_id: str) -> jobs_pb2.Job:
        """Ask a job to stop and return it as it is now; raise NotFoundError where there is none."""
        run = await self._require(job_id)
        active = self._active.get(run)
        if active is not None and not run.cancelling:
            _log.info("job cancelled", job_id=job_id, pipeline_id=run.key.pipeline_id)
            run.cancelling = True
            active.leave_queue.set()
            if active.process is not None:
                self._stop(active.process)
        return run.snapshot()

    async def interrupt(self, error: GranqError) -> None:
        """Kill all processes, and return when they have ended; their jobs have failed with the error."""
        actives = list(self._active.values())
        for active in actives:
            active.interruption = error
            active.leave_queue.set()
            if active.process is not None:
                active.process.kill()
        await asyncio.gather(*(asyncio.shield(active.task) for active in actives if active.task is not None))

    async def retire(self, idle_seconds: float) -> None:
        """Return once nobody has used the worker for so many seconds; from then on no job begins."""
        await self.usage.unused(idle_seconds)
        self._closing = True

    async def close(self, grace: float) -> None:
        """End all processes, kindly for `grace` seconds, and all watches; no job is noted as failed for it."""
        self._closing = True
        tasks = {active.task for active in self._active.values() if active.task is not None}
        for active in self._active.values():
            active.leave_queue.set()
            if active.process is not None:
                active.process.terminate()
        if tasks:
            await asyncio.wait(tasks, timeout=grace)
            for active in self._active.values():
                if active.process is not None:
                    active.process.kill()
            await asyncio.gather(*tasks)

    def _stopping(self) -> UnavailableError:
        return UnavailableError("the server is about to end; try again", reason="SERVER_STOPPING")

    async def _find(self, job_id: str) -> Run | None:
        run = self._runs.get(job_id)
        if run is not None and not run.restartable:
            return run
        stored = await asyncio.to_thread(self._records.load_success, job_id)
        if stored is not None and stored[0].kind in self._kinds:
            run = self._runs[job_id] = Run.finished(*stored)
            self._forget_oldest()
        return run

    async def _require(self, job_id: str) -> Run:
        async with self._lock:
            run = await self._find(job_id)
        if run is None:
            raise NotFoundError(f"this server has no job {job_id!r}", reason="JOB_NOT_FOUND", field="job_id")
        return run

    def _forget_oldest(self) -> None:
        ended = [job_id for job_id, run in self._runs.items() if run.ended]
        for job_id in ended[: max(0, len(self._runs) - _MAX_HELD)]:
            del self._runs[job_id]

    def _stop(self, process: JobProcess) -> None:
        process.ask_to_stop()
        # Nothing happens where the process has ended by then.
        asyncio.get_running_loop().call_later(self._kill_after, process.kill)

    async def _traced(self, run: Run, active: ActiveRun, request: Message) -> None:
        # Below the RPC that started it, since a task begins with a copy of what is current where it is made.
        job = tracing.span(f"job {run.kind}", granq_job_id=run.job_id, granq_pipeline_id=run.key.pipeline_id)
        with self.usage.used(), job as span:
            await self._execute(run, active, request)
            tracing.note_outcome(span, run.outcome)

    async def _execute(self, run: Run, active: ActiveRun, request: Message) -> None:
        log = _log.bind(kind=run.kind, job_id=run.job_id, pipeline_id=run.key.pipeline_id, run_id=run.run_id)
        queued, began = metrics.JOBS_QUEUED.labels(run.kind), time.monotonic()
        success: jobs_pb2.Job | None
        try:
            with queued.track_inprogress(), metrics.QUEUE_AGES.waiting(run.kind):
                if not await self._slots.acquire_unless(active.leave_queue, (-run.key.priority, 0)):
                    raise CancelledError("the job left the queue")
            try:
                began, waited = time.monotonic(), time.monotonic() - began
                metrics.JOB_WAIT_SECONDS.labels(run.kind).observe(waited)
                with metrics.JOBS_RUNNING.labels(run.kind).track_inprogress():
                    result = await self._run_process(run, active, request)
            finally:
                self._slots.release()
            success = run.as_succeeded(result)
            await asyncio.to_thread(self._records.save_success, success)
        except Exception as error:
            success, failure = None, active.interruption or error
        if active.process is not None:
            await asyncio.to_thread(self._records.release, run.job_id, run.run_id)
        # From here on nothing is awaited: whoever hears of the end finds it counted, and the lease free.
        del self._active[run]
        if success is None:
            self._note_failure(run, failure)
        else:
            run.succeed(success)
            self._on_success(success.result)
        metrics.JOBS.labels(run.kind, run.outcome).inc()
        metrics.JOB_SECONDS.labels(run.kind, run.outcome).observe(time.monotonic() - began)
        log.info("job ended", outcome=run.outcome, seconds=round(time.monotonic() - began, 3))

    def _note_failure(self, run: Run, error: BaseException) -> None:
        log = _log.bind(kind=run.kind, job_id=run.job_id, pipeline_id=run.key.pipeline_id)
        if run.cancelling:
            run.fail(CancelledError("the job was cancelled"))
        elif self._closing:
            run.close()
        else:
            if isinstance(error, CancelledError):
                # Only a signal from elsewhere stops a job that nobody cancelled.
                error = UnavailableError("the job's process was ended by SIGTERM", reason="JOB_PROCESS_DIED")
            known = as_granq_error(error)
            if known is None:
                log.error("job failed by a defect of the server", exc_info=error)
            else:
                log.warning("job failed", reason=known.reason, error=known.message)
            run.fail(error)

    async def _run_process(self, run: Run, active: ActiveRun, request: Message) -> jobs_pb2.JobResult:
        process = await JobProcess.spawn(run.kind, self._kinds[run.kind], run.key, request, self._settings, run.run_id)
        run.begin()
        _log.info("job began", kind=run.kind, job_id=run.job_id, pipeline_id=run.key.pipeline_id, pid=process.pid)
        active.process = process
        # What was asked while the process was made.
        if run.cancelling:
            self._stop(process)
        elif self._closing or active.interruption is not None:
            process.kill()

        def on_progress(progress: jobs_pb2.Progress) -> None:
            run.progress(progress)
            training.observe(progress.metrics)

        try:
            with metrics.CHILDREN.watched(process.pid, run.kind), metrics.TrainingMetrics(run.kind) as training:
                return await process.result(on_progress)
        except GranqError as error:
            if error.reason in ("JOB_PROCESS_DIED", "JOB_PROCESS_EXITED"):
                if not run.cancelling and not self._closing:
                    metrics.JOB_DEATHS.labels(run.kind).inc()
                _log.error("job's process died", job_id=run.job_id, error=error.message, stderr=process.log_tail)
            raise
