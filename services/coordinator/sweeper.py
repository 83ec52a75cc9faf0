"""Finds pipelines that nobody drives any more, and drives them on.

How a pipeline is left alone, and what is done:

- The coordinator died between storing it and starting its workflow: the workflow is started.
- It was cancelled, and the coordinator died before that was carried through: it is carried through.
- Its coordinator is gone for good (scaled down; its executor lock is free): this one takes it over.
- It was begun by another application version, which the workflow engine does not recover: taken over.
- Its time was over while it waited, or while nobody drove it: it fails.
- Its workflow ended without an outcome (the database was away) or was not recovered: taken over.

To take over is to give the pipeline a new attempt number, by which every write of the old workflow is refused from then
on, and a new workflow; finished stages keep their results and the running job is attached to.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from granq.v1 import common_pb2
from services.common.errors import UnavailableError, to_failure
from services.common.logs import get_logger
from services.coordinator.driver import overdue
from services.coordinator.engine import WorkflowEngine
from services.coordinator.locks import ExecutorLocks, HeldLock
from services.coordinator.repository import DrivenPipeline, Repository
from services.coordinator.threads import Threads
from services.coordinator.transitions import State, Transitions, now_us

# The driver itself ends a stage in time, and stops its job. This is for those that have none.
_LATE_US = 2_000_000

log = get_logger(__name__)


class Sweeper:
    """Looks for lost pipelines at its start, and then from time to time.

    Args:
        repository: Stored pipelines.
        transitions: Changes of their state.
        threads: Where database calls run.
        engine: Runs workflows.
        locks: Say which coordinators live.
        held: The lock of this one.
        executor_id: This coordinator.
        application_version: Version of its workflows.
        finish_cancel: Carries a cancellation through.
        end_stray_jobs: Ends jobs that outlived their cancelled pipelines.
        interval_seconds: Time between two sweeps.
    """

    def __init__(
        self,
        *,
        repository: Repository,
        transitions: Transitions,
        threads: Threads,
        engine: WorkflowEngine,
        locks: ExecutorLocks,
        held: HeldLock,
        executor_id: str,
        application_version: str,
        finish_cancel: Callable[[str, int], Awaitable[None]],
        end_stray_jobs: Callable[[], Awaitable[None]],
        interval_seconds: float,
    ) -> None:
        self._repository = repository
        self._transitions = transitions
        self._threads = threads
        self._engine = engine
        self._locks = locks
        self._held = held
        self._executor_id = executor_id
        self._version = application_version
        self._finish_cancel = finish_cancel
        self._end_stray_jobs = end_stray_jobs
        self._interval_seconds = interval_seconds
        self._suspects: set[tuple[str, int]] = set()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Sweep once, then in the background."""
        await self.sweep()
        self._task = asyncio.create_task(self._sweep_on())

    async def _sweep_on(self) -> None:
        while True:
            await asyncio.sleep(self._interval_seconds)
            try:
                await self.sweep()
                await self._end_stray_jobs()
            except Exception:
                log.exception("sweep failed; it is repeated")

    async def sweep(self) -> None:
        """Look at every pipeline that has not ended, once."""
        if not await self._threads.call(self._held.renew):
            # The connection to the database broke, and another process took this id before it was back.
            log.error("another coordinator has this executor id now; give each its own", executor_id=self._executor_id)
            return
        alive: dict[str, bool] = {}
        suspects: set[tuple[str, int]] = set()
        for pipeline in await self._threads.call(self._repository.unfinished):
            if pipeline.deadline is not None and pipeline.deadline <= now_us() - _LATE_US:
                await self._expire(pipeline)
                continue
            owner = pipeline.executor_id
            if owner != self._executor_id:
                if owner not in alive:
                    alive[owner] = await self._threads.call(self._locks.is_live, owner)
                if not alive[owner]:
                    await self._take_over(pipeline, f"coordinator {owner} is gone")
                continue
            await self._check_own(pipeline, suspects)
        self._suspects = suspects

    async def _expire(self, pipeline: DrivenPipeline) -> None:
        key = (pipeline.pipeline_id, pipeline.attempt)
        spec = (await self._threads.call(self._repository.get, pipeline.pipeline_id)).pipeline.spec
        if await self._threads.call(self._transitions.expire, *key, to_failure(overdue(spec))):
            log.warning("pipeline is overdue", pipeline_id=pipeline.pipeline_id)
            await self._engine.cancel(*key)

    async def _check_own(self, pipeline: DrivenPipeline, suspects: set[tuple[str, int]]) -> None:
        key = (pipeline.pipeline_id, pipeline.attempt)
        if pipeline.state == State.PIPELINE_STATE_CANCELLING:
            await self._finish_cancel(*key)
            return
        if self._engine.running(*key):
            return
        record = await self._engine.record(*key)
        if record is None:
            self._engine.start(*key)
        elif record.live and record.executor_id == self._executor_id and record.application_version != self._version:
            await self._take_over(pipeline, f"it was begun by version {record.application_version}")
        elif key in self._suspects:
            await self._take_over(pipeline, "its workflow stopped")
        else:
            # The engine is about to recover it, or it ended this moment. Whether it is lost, the next sweep knows.
            suspects.add(key)

    async def _take_over(self, pipeline: DrivenPipeline, why: str) -> None:
        if pipeline.state == State.PIPELINE_STATE_CANCELLING:
            await self._finish_cancel(pipeline.pipeline_id, pipeline.attempt)
            return
        cause: common_pb2.Failure = to_failure(
            UnavailableError(f"{why}; coordinator {self._executor_id} goes on", reason="COORDINATOR_CHANGED")
        )
        adopted = await self._threads.call(
            self._transitions.adopt, pipeline.pipeline_id, pipeline.attempt, self._executor_id, cause
        )
        if adopted is None:
            return
        log.warning("took over a pipeline", pipeline_id=pipeline.pipeline_id, why=why)
        await self._engine.cancel(pipeline.pipeline_id, pipeline.attempt)
        self._engine.start(pipeline.pipeline_id, adopted)

    async def close(self) -> None:
        """Stop sweeping."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
