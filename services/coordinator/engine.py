"""The workflow engine: DBOS behind the few calls that the coordinator needs.

What DBOS gives: a process that is started again goes on behind the last finished step of each workflow. What it does
not give is done here or by the caller: executor id and application version set explicitly (with the defaults, a second
process runs a live step twice and every code change orphans what was running); cancelling that takes effect in the
middle of a step; finding workflows that no process drives (`sweeper.py`); and a queue. A workflow begins with its turn:
one that waits costs a submission as much as the pipeline's row, and all others their time in garbage collections.

Steps return short strings, nothing else: results are in the pipeline's own row, so a workflow can be given up and its
pipeline driven by a new one, of any code version, without losing a stage. JSON is the serialization, never pickle.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer, SetWorkflowID, StepOptions
from sqlalchemy import URL

from services.common.logs import get_logger
from services.common.slots import Place, Slots
from services.coordinator.database import sqlite_path
from services.coordinator.sqlite import QuickConnection

CONTINUE = "continue"
"""What a step returns when the workflow goes on with the next one; anything else ends the workflow."""

PlaceOf = Callable[[str], Coroutine[Any, Any, Place]]
RunStep = Callable[[str, int, int], Coroutine[Any, Any, str]]

_LIVE = ("PENDING", "ENQUEUED", "DELAYED")

log = get_logger(__name__)


@dataclass(frozen=True)
class WorkflowRecord:
    """What the engine's database says of a workflow."""

    live: bool
    executor_id: str
    application_version: str


def _is_worth_reading(record: logging.LogRecord) -> bool:
    # Ending a running step's task is how cancelling and shutting down work here, so DBOS need not warn of it.
    return "Asyncio task cancelled" not in record.getMessage()


def workflow_id(pipeline_id: str, attempt: int) -> str:
    """Return the id of the workflow that drives an attempt of a pipeline."""
    return f"{pipeline_id}-{attempt}"


async def _end(*tasks: "asyncio.Task[Any] | None") -> None:
    ending = {task for task in tasks if task is not None}
    for task in ending:
        task.cancel()
    if ending:
        await asyncio.wait(ending)


class WorkflowEngine:
    """Runs one workflow per attempt of a pipeline: the given steps, one after the other.

    DBOS is a singleton of its process, so at most one engine may be open in a process.

    Args:
        url: Database; the engine keeps its own tables there.
        executor_id: Stable name of this process.
        application_version: Version of the steps; only workflows of this version are recovered.
        steps: Numbers and names of the steps, in order. The names are stored and must not change within a version.
        run_step: Called with pipeline id, attempt and step number; must bear being called again for the same step.
        max_running: Workflows that run at once.
        place_of: Returns the place of a pipeline among those that wait to run.
    """

    def __init__(
        self,
        *,
        url: URL,
        executor_id: str,
        application_version: str,
        steps: Sequence[tuple[int, str]],
        run_step: RunStep,
        max_running: int,
        place_of: PlaceOf,
    ) -> None:
        self._steps = tuple(steps)
        self._run_step = run_step
        self._slots = Slots(max_running)
        self._place_of = place_of
        self._turns: dict[str, asyncio.Task[None]] = {}
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self._kept: set[str] = set()  # to be recovered; each has its slot, lest one that never ran takes it
        self._executor_id, self._version = executor_id, application_version
        # DBOS gives its logger a handler and a format of its own unless it has one; records shall go to the root.
        logger = logging.getLogger("dbos")
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
        logger.addFilter(_is_worth_reading)
        sqlite = sqlite_path(url) is not None
        self._config = DBOSConfig(
            name="granq-coordinator",
            system_database_url=url.render_as_string(hide_password=False),
            executor_id=executor_id,
            application_version=application_version,
            serializer=DBOSPortableJSONSerializer(),
            log_level="WARNING",
            enable_otlp=False,
            scheduler_polling_interval_sec=3600.0,  # nothing is scheduled
            sys_db_pool_size=8,
            # A power cut may take back what the engine wrote last to SQLite: the pipelines' own rows, which it cannot,
            # have all that is needed to start a workflow anew. A file needs no question whether it still answers.
            db_engine_kwargs={"connect_args": {"factory": QuickConnection}, "pool_pre_ping": False} if sqlite else None,
        )

    def launch(self) -> None:
        """Bring the engine's tables up and begin to recover this executor's workflows.

        Must be called on the event loop that is to run the workflows, and blocks it for a moment.
        """
        DBOS(config=self._config)

        # A function, because DBOS cannot decorate a method. Recovery attempts are not limited: a coordinator may be
        # restarted often while a job trains for days.
        @DBOS.workflow(name="pipeline", max_recovery_attempts=None)
        async def pipeline(pipeline_id: str, attempt: int) -> str:
            return await self._drive(pipeline_id, attempt)

        self._workflow = pipeline
        DBOS.launch()
        # In a thread, because DBOS refuses this on a loop; which waits for it, so none of them has begun yet.
        pending = partial(
            DBOS.list_workflows,
            status=list(_LIVE),
            executor_id=self._executor_id,
            app_version=self._version,
            load_input=False,
        )
        with ThreadPoolExecutor(1) as pool:
            for found in pool.submit(pending).result():
                if self._slots.take():
                    self._kept.add(found.workflow_id)

    async def _drive(self, pipeline_id: str, attempt: int) -> str:
        name = workflow_id(pipeline_id, attempt)
        task = asyncio.current_task()
        if task is not None:
            self._tasks[name] = task
        try:
            if name in self._turns:
                return await self._take_steps(pipeline_id, attempt)
            # Recovered. Where there are fewer slots now, some have none and wait here.
            if name in self._kept:
                self._kept.remove(name)
            else:
                await self._slots.acquire(await self._place_of(pipeline_id))
            try:
                return await self._take_steps(pipeline_id, attempt)
            finally:
                self._slots.release()
        finally:
            if self._tasks.get(name) is task:
                del self._tasks[name]

    async def _take_steps(self, pipeline_id: str, attempt: int) -> str:
        outcome = CONTINUE
        for number, step in self._steps:
            options = StepOptions(name=step)
            outcome = await DBOS.run_step_async(options, self._run_step, pipeline_id, attempt, number)
            if outcome != CONTINUE:
                break
        return outcome

    def start(self, pipeline_id: str, attempt: int) -> None:
        """Have the workflow of an attempt start in its turn; nothing happens when it was started before.

        Until then this process alone knows of it. When it ends before, the sweeper of the next one calls this again.
        """
        name = workflow_id(pipeline_id, attempt)
        if not self.running(pipeline_id, attempt):
            turn = asyncio.create_task(self._start_in_turn(pipeline_id, attempt))
            self._turns[name] = turn
            # Not at its end: one that is cancelled before it began has none.
            turn.add_done_callback(lambda _turn: self._turns.pop(name))

    async def _start_in_turn(self, pipeline_id: str, attempt: int) -> None:
        try:
            async with self._slots.hold(await self._place_of(pipeline_id)):
                if await self.record(pipeline_id, attempt) is None:
                    with SetWorkflowID(workflow_id(pipeline_id, attempt)):
                        handle = await DBOS.start_workflow_async(self._workflow, pipeline_id, attempt)
                    await handle.get_result()
        except Exception:
            log.exception("workflow broke off; the sweeper looks at it", pipeline_id=pipeline_id, attempt=attempt)

    async def cancel(self, pipeline_id: str, attempt: int) -> None:
        """Cancel the workflow of an attempt, its running step included when that runs in this process."""
        name = workflow_id(pipeline_id, attempt)
        if name in self._kept:
            self._kept.remove(name)
            self._slots.release()
        if name not in self._tasks:
            await _end(self._turns.get(name))
        await DBOS.cancel_workflow_async(name)
        await _end(self._tasks.get(name))
        await _end(self._turns.get(name))

    def running(self, pipeline_id: str, attempt: int) -> bool:
        """Return whether this process runs the workflow, or has it wait for its turn."""
        name = workflow_id(pipeline_id, attempt)
        return name in self._turns or name in self._tasks

    async def record(self, pipeline_id: str, attempt: int) -> WorkflowRecord | None:
        """Return what the database says of a workflow; None when it was never started."""
        found = await DBOS.get_workflow_status_async(workflow_id(pipeline_id, attempt))
        if found is None:
            return None
        return WorkflowRecord(found.status in _LIVE, found.executor_id or "", found.app_version or "")

    async def forget(self, pipeline_id: str, attempts: int) -> None:
        """Remove the records of a pipeline's workflows."""
        names = [workflow_id(pipeline_id, number) for number in range(1, attempts + 1)]
        await DBOS.delete_workflows_async(names)

    async def close(self) -> None:
        """Stop without ending any workflow: each stays on disk, and the next process goes on with it."""
        await _end(*self._turns.values())
        await _end(*self._tasks.values())
        # DBOS put its pool, which ends here, in the place of the loop's default one, which others go on to use.
        loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(thread_name_prefix="default")
        loop.set_default_executor(pool)
        # In a thread, because it joins threads that may be waiting for this loop.
        await loop.run_in_executor(pool, partial(DBOS.destroy, destroy_registry=True))
