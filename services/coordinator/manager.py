"""What users can do with pipelines: submit, get, list, watch, cancel, retry, delete."""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Callable, Sequence

from granq.v1 import coordinator_pb2, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import GranqError, InvalidArgumentError, NotFoundError
from services.common.logs import get_logger
from services.common.tracing import link_pipeline
from services.coordinator.calls import DatabaseCalls
from services.coordinator.engine import WorkflowEngine
from services.coordinator.hub import EventHub
from services.coordinator.repository import OpenJob, Position, Repository
from services.coordinator.retention import forget_jobs
from services.coordinator.transitions import Transitions
from services.coordinator.validation import check_spec, check_stored
from services.coordinator.workers import RunningJobs

DEFAULT_PAGE_SIZE = 50
_JOB_ENDED = (jobs_pb2.JOB_STATE_SUCCEEDED, jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED)
_LOOK_SECONDS = 0.2

log = get_logger(__name__)


class PipelineManager:
    """The pipelines of one coordinator.

    Args:
        repository: Stored pipelines.
        transitions: Changes of their state.
        hub: Their events.
        calls: Run calls of database and store.
        engine: Runs their workflows.
        jobs: The jobs that they started.
        store: Artifacts.
        executor_id: This coordinator.
        cancel_seconds: Longest wait for a worker to end a cancelled job.
        deleted: Called after a pipeline was deleted.
    """

    def __init__(
        self,
        *,
        repository: Repository,
        transitions: Transitions,
        hub: EventHub,
        calls: DatabaseCalls,
        engine: WorkflowEngine,
        jobs: RunningJobs,
        store: ArtifactStore,
        executor_id: str,
        cancel_seconds: float,
        deleted: Callable[[], None],
    ) -> None:
        self._repository = repository
        self._transitions = transitions
        self._hub = hub
        self._calls = calls
        self._engine = engine
        self._jobs = jobs
        self._store = store
        self._executor_id = executor_id
        self._cancel_seconds = cancel_seconds
        self._deleted = deleted
        self._cancellations: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._strays = asyncio.Lock()

    async def submit(
        self, spec: coordinator_pb2.PipelineSpec, request_id: str, owner: str = ""
    ) -> coordinator_pb2.Pipeline:
        """Start a pipeline, or return the one that the same request started before.

        Raises:
            InvalidArgumentError: Parts of the spec contradict each other.
            NotFoundError: The store does not hold the model or the dataset.
            AlreadyExistsError: The request id belongs to another spec.
        """
        pipeline, created = await self._calls.call(self._admit, spec, request_id, owner)
        if created:
            log.info("pipeline submitted", pipeline_id=pipeline.pipeline_id, client_request_id=request_id)
            link_pipeline(pipeline.pipeline_id, 1)
            # It waits in memory; what is stored, the sweeper starts after a crash.
            self._engine.start(pipeline.pipeline_id, 1)
        return pipeline

    def _admit(
        self, spec: coordinator_pb2.PipelineSpec, request_id: str, owner: str
    ) -> tuple[coordinator_pb2.Pipeline, bool]:
        """Check and store a pipeline, and return it and whether this call made it.

        Blocks. One call, since between two each would wait again for a thread, behind those that wait for the database.
        """
        # Before the checks: a repeat gets its pipeline even when the model was removed from the store meanwhile.
        earlier = self._repository.find(spec, request_id, owner)
        if earlier is not None:
            return earlier, False
        check_spec(spec, self._store)
        pipeline, created = self._repository.create(spec, request_id, self._executor_id, owner)
        if created:
            try:
                # Once more, now that the pipeline keeps them: they may have been removed between the two.
                check_stored(spec, self._store)
            except GranqError:
                self._repository.withdraw(pipeline.pipeline_id)
                raise
        return pipeline, created

    async def get(self, pipeline_id: str) -> coordinator_pb2.Pipeline:
        """Return a pipeline, or raise NotFoundError."""
        return (await self._calls.call(self._repository.get, pipeline_id)).pipeline

    async def page(
        self, states: Sequence[int], page_size: int, page_token: str, owner: str | None = None
    ) -> tuple[list[coordinator_pb2.Pipeline], str]:
        """Return a page of pipelines, newest first, and the token of the next one, empty on the last.

        Raises:
            InvalidArgumentError: The token is none of this listing.
        """
        wanted = sorted(set(states))
        after = _read_token(page_token, wanted) if page_token else None
        pipelines, following = await self._calls.call(
            self._repository.page, wanted, after, page_size or DEFAULT_PAGE_SIZE, owner
        )
        return pipelines, _write_token(following, wanted) if following is not None else ""

    def watch(self, pipeline_id: str, after: int) -> AsyncGenerator[coordinator_pb2.WatchPipelineResponse, None]:
        """Yield a pipeline's events behind a number until it has ended; raises NotFoundError."""
        return self._hub.watch(pipeline_id, after)

    async def cancel(self, pipeline_id: str) -> coordinator_pb2.Pipeline:
        """Begin to stop a pipeline and return it; one that has ended is returned as it is. Raises NotFoundError."""
        if await self._calls.call(self._transitions.request_cancel, pipeline_id):
            snapshot = await self._calls.call(self._repository.get, pipeline_id)
            await self.finish_cancel(pipeline_id, snapshot.attempt)
            return snapshot.pipeline
        return await self.get(pipeline_id)

    async def finish_cancel(self, pipeline_id: str, attempt: int) -> None:
        """Carry a cancellation through in the background."""
        key = (pipeline_id, attempt)
        if key not in self._cancellations:
            self._cancellations[key] = asyncio.create_task(self._carry_through(pipeline_id, attempt))
            self._cancellations[key].add_done_callback(lambda _task: self._cancellations.pop(key))

    async def _carry_through(self, pipeline_id: str, attempt: int) -> None:
        try:
            await self._engine.cancel(pipeline_id, attempt)
            jobs = await self._calls.call(self._repository.open_jobs, pipeline_id)
            await asyncio.gather(*(self._end_job(pipeline_id, job) for job in jobs))
        except Exception:
            # Whatever it was, the user's wish is what counts; the state must not stay CANCELLING.
            log.exception("cancelling met an error", pipeline_id=pipeline_id)
        await self._calls.insist(self._transitions.finish_cancel, pipeline_id)
        log.info("pipeline cancelled", pipeline_id=pipeline_id)

    async def _end_job(self, pipeline_id: str, job: OpenJob) -> bool:
        """Ask a job to end and wait until it did, but not for ever; return whether its worker was there."""
        try:
            async with asyncio.timeout(self._cancel_seconds):
                current = await self._jobs.cancel(job.worker, job.job_id, self._cancel_seconds)
                while current.state not in _JOB_ENDED:
                    await asyncio.sleep(_LOOK_SECONDS)
                    current = await self._jobs.get(job.worker, job.job_id)
        except NotFoundError:
            pass  # never started, or forgotten by a restarted worker: nothing runs
        except (GranqError, TimeoutError) as error:
            log.warning("job not seen to end", pipeline_id=pipeline_id, job_id=job.job_id, error=str(error))
            return False
        await self._calls.call(self._repository.close_job, pipeline_id, job.job_id)
        return True

    async def end_stray_jobs(self) -> None:
        """Ask once more for the end of jobs whose pipeline was cancelled or failed while their worker was away."""
        away: set[str] = set()
        for pipeline_id in await self._calls.call(self._repository.ended_with_jobs):
            async with self._strays:  # a retry, which wants its jobs, forgets the rows only between two pipelines
                for job in await self._calls.call(self._repository.open_jobs, pipeline_id):
                    if job.worker not in away and not await self._end_job(pipeline_id, job):
                        away.add(job.worker)

    async def retry(self, pipeline_id: str) -> coordinator_pb2.Pipeline:
        """Continue a FAILED or CANCELLED pipeline at the stage that failed, and return it.

        Raises:
            NotFoundError: There is no such pipeline.
            FailedPreconditionError: It is in another state.
        """
        async with self._strays:
            attempt = await self._calls.call(self._transitions.retry, pipeline_id, self._executor_id)
        pipeline = await self.get(pipeline_id)
        self._engine.start(pipeline_id, attempt)
        log.info("pipeline retried", pipeline_id=pipeline_id, attempt=attempt)
        return pipeline

    async def delete(self, pipeline_id: str) -> None:
        """Remove a pipeline that has ended, and the records of its jobs; artifacts that only it named go later.

        Raises:
            NotFoundError: There is no such pipeline.
            FailedPreconditionError: It has not ended.
        """
        attempts = await self._calls.call(self._repository.delete, pipeline_id)
        self._hub.changed(pipeline_id)
        await self._engine.forget(pipeline_id, attempts)
        await self._calls.call(forget_jobs, self._store, pipeline_id)
        self._deleted()

    async def close(self) -> None:
        """Wait for cancellations that are under way; they are short."""
        await asyncio.gather(*self._cancellations.values(), return_exceptions=True)


def _write_token(position: Position, states: Sequence[int]) -> str:
    text = f"{position.create_time}:{position.pipeline_id}:{','.join(map(str, states))}"
    return base64.urlsafe_b64encode(text.encode()).decode()


def _read_token(token: str, states: Sequence[int]) -> Position:
    try:
        created, pipeline_id, made_for = base64.urlsafe_b64decode(token.encode()).decode().split(":")
        position = Position(int(created), pipeline_id)
    except (ValueError, binascii.Error) as error:
        raise InvalidArgumentError("page_token is not one that ListPipelines returned", field="page_token") from error
    if made_for != ",".join(map(str, states)):
        raise InvalidArgumentError("page_token belongs to a listing with other states", field="page_token")
    return position
