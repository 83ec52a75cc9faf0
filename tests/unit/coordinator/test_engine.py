"""The workflow engine: steps in order, once each; stopped, cancelled and recovered."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from services.coordinator.database import parse_url
from services.coordinator.engine import CONTINUE, WorkflowEngine
from tests.support.pipelines import sqlite_url

STEPS = ((1, "first"), (2, "second"), (3, "third"))


class Steps:
    """Steps that note that they ran, and wait where they are told to."""

    def __init__(self, blocked_at: int = 0, ends_at: int = 0) -> None:
        self.ran: list[tuple[str, int, int]] = []
        self.cancelled = 0
        self.done = asyncio.Event()
        self.reached = asyncio.Event()
        self._blocked_at = blocked_at
        self._ends_at = ends_at

    async def run(self, pipeline_id: str, attempt: int, step: int) -> str:
        self.ran.append((pipeline_id, attempt, step))
        if step == self._blocked_at:
            self.reached.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if step in (self._ends_at, STEPS[-1][0]):
            self.done.set()
        return "enough" if step == self._ends_at else CONTINUE


async def _place_of(pipeline_id: str) -> tuple[int, int]:
    return {"urgent": (-10, 9), "unimportant": (10, 0)}.get(pipeline_id, (0, 0))


@asynccontextmanager
async def _engine(
    folder: Path, run: Callable[[str, int, int], Coroutine[Any, Any, str]], version: str = "1", max_running: int = 8
) -> AsyncIterator[WorkflowEngine]:
    made = WorkflowEngine(
        url=parse_url(sqlite_url(folder)),
        executor_id="me",
        application_version=version,
        steps=STEPS,
        run_step=run,
        max_running=max_running,
        place_of=_place_of,
    )
    made.launch()
    try:
        yield made
    finally:
        await made.close()


async def _until_ended(engine: WorkflowEngine, pipeline_id: str, attempt: int) -> None:
    async with asyncio.timeout(10):
        while (record := await engine.record(pipeline_id, attempt)) is None or record.live:
            await asyncio.sleep(0.01)


async def test_steps_run_in_order_and_starting_again_changes_nothing(tmp_path: Path) -> None:
    steps = Steps()
    async with _engine(tmp_path, steps.run) as engine:
        assert await engine.record("p", 1) is None
        for _ in range(4):
            engine.start("p", 1)
        await _until_ended(engine, "p", 1)
        engine.start("p", 1)
        engine.start("p", 2)
        await _until_ended(engine, "p", 2)
        await engine.forget("p", 2)
        assert await engine.record("p", 1) is None
    assert steps.ran == [("p", attempt, step) for attempt in (1, 2) for step in (1, 2, 3)]


async def test_a_step_can_end_the_workflow(tmp_path: Path) -> None:
    steps = Steps(ends_at=2)
    async with _engine(tmp_path, steps.run) as engine:
        engine.start("p", 1)
        await _until_ended(engine, "p", 1)
        async with asyncio.timeout(10):
            while engine.running("p", 1):
                await asyncio.sleep(0.01)
    assert [step for _name, _attempt, step in steps.ran] == [1, 2]


async def test_cancelling_interrupts_a_running_step(tmp_path: Path) -> None:
    steps = Steps(blocked_at=2)
    async with _engine(tmp_path, steps.run) as engine:
        engine.start("p", 1)
        await asyncio.wait_for(steps.reached.wait(), 10)
        assert engine.running("p", 1)
        async with asyncio.timeout(2):
            await engine.cancel("p", 1)
        assert not engine.running("p", 1)
        record = await engine.record("p", 1)
        assert record is not None
        assert not record.live
    assert steps.cancelled == 1


async def test_a_closed_engine_leaves_its_workflow_to_the_next_one(tmp_path: Path) -> None:
    before = Steps(blocked_at=2)
    async with _engine(tmp_path, before.run) as engine:
        engine.start("p", 1)
        await asyncio.wait_for(before.reached.wait(), 10)
    after = Steps()
    async with _engine(tmp_path, after.run) as engine:
        await asyncio.wait_for(after.done.wait(), 20)
        await _until_ended(engine, "p", 1)
    assert [step for _name, _attempt, step in after.ran] == [2, 3]


async def test_another_version_does_not_touch_old_workflows_but_can_see_them(tmp_path: Path) -> None:
    before = Steps(blocked_at=1)
    async with _engine(tmp_path, before.run, "1") as engine:
        engine.start("p", 1)
        await asyncio.wait_for(before.reached.wait(), 10)
    after = Steps()
    async with _engine(tmp_path, after.run, "2") as engine:
        record = await engine.record("p", 1)
        assert record is not None
        assert (record.live, record.executor_id, record.application_version) == (True, "me", "1")
        engine.start("q", 1)
        await asyncio.wait_for(after.done.wait(), 20)
    assert {name for name, _attempt, _step in after.ran} == {"q"}


async def test_only_so_many_workflows_run_at_once(tmp_path: Path) -> None:
    running: set[str] = set()
    most, release = 0, asyncio.Event()

    async def run(pipeline_id: str, _attempt: int, step: int) -> str:
        nonlocal most
        running.add(pipeline_id)
        most = max(most, len(running))
        await release.wait()
        if step == STEPS[-1][0]:
            running.remove(pipeline_id)
        return CONTINUE

    async with _engine(tmp_path, run, max_running=2) as engine:
        names = [f"p{number}" for number in range(6)]
        for name in names:
            engine.start(name, 1)
        async with asyncio.timeout(10):
            while len(running) < 2 or not all(engine.running(name, 1) for name in names):
                await asyncio.sleep(0.01)
        release.set()
        for name in names:
            await _until_ended(engine, name, 1)
    assert most == 2


async def test_who_waits_is_cancelled_without_a_trace_and_starts_after_a_stop_when_told_again(
    tmp_path: Path,
) -> None:
    steps = Steps(blocked_at=1)
    async with _engine(tmp_path, steps.run, max_running=1) as engine:
        engine.start("first", 1)
        await asyncio.wait_for(steps.reached.wait(), 10)
        for name in ("cancelled", "stopped"):
            engine.start(name, 1)
        await engine.cancel("cancelled", 1)
        assert not engine.running("cancelled", 1)
        assert engine.running("stopped", 1)
    after = Steps()
    async with _engine(tmp_path, after.run) as engine:
        assert await engine.record("cancelled", 1) is None
        assert await engine.record("stopped", 1) is None
        engine.start("stopped", 1)
        await _until_ended(engine, "stopped", 1)
        await _until_ended(engine, "first", 1)
    assert {name for name, _attempt, _step in steps.ran} == {"first"}
    assert {name for name, _attempt, _step in after.ran} == {"first", "stopped"}


async def test_what_ran_goes_on_before_what_waited(tmp_path: Path) -> None:
    before = Steps(blocked_at=2)
    async with _engine(tmp_path, before.run, max_running=1) as engine:
        engine.start("unimportant", 1)
        await asyncio.wait_for(before.reached.wait(), 10)
        engine.start("urgent", 1)
    after = Steps()
    async with _engine(tmp_path, after.run, max_running=1) as engine:
        engine.start("urgent", 1)
        for name in ("urgent", "unimportant"):
            await _until_ended(engine, name, 1)
    assert [(name, step) for name, _, step in after.ran] == [
        *(("unimportant", step) for step in (2, 3)),
        *(("urgent", step) for step in (1, 2, 3)),
    ]


async def test_what_is_cancelled_before_it_goes_on_leaves_its_place(tmp_path: Path) -> None:
    before = Steps(blocked_at=2)
    async with _engine(tmp_path, before.run, max_running=1) as engine:
        engine.start("first", 1)
        await asyncio.wait_for(before.reached.wait(), 10)
    after = Steps()
    async with _engine(tmp_path, after.run, max_running=1) as engine:
        await engine.cancel("first", 1)
        engine.start("second", 1)
        await _until_ended(engine, "second", 1)
    assert {name for name, _, _ in after.ran} == {"second"}


async def test_nothing_is_pickled(tmp_path: Path) -> None:
    steps = Steps()
    async with _engine(tmp_path, steps.run) as engine:
        engine.start("p", 1)
        await _until_ended(engine, "p", 1)
    tables = create_engine(sqlite_url(tmp_path))
    with tables.connect() as connection:
        kinds = set(connection.scalars(text("SELECT serialization FROM workflow_status")))
        kinds |= set(connection.scalars(text("SELECT serialization FROM operation_outputs")))
    tables.dispose()
    assert kinds == {"portable_json"}


async def test_those_that_wait_go_by_their_place(tmp_path: Path) -> None:
    steps, blocked = Steps(blocked_at=1), asyncio.Event()

    async def run(pipeline_id: str, attempt: int, step: int) -> str:
        if pipeline_id == "first" and step == 1:
            await blocked.wait()
        steps.ran.append((pipeline_id, attempt, step))
        return CONTINUE

    async with _engine(tmp_path, run, max_running=1) as engine:
        for name in ("first", "unimportant", "second", "urgent"):
            engine.start(name, 1)
            async with asyncio.timeout(10):
                while not engine.running(name, 1):
                    await asyncio.sleep(0.01)
        blocked.set()
        for name in ("first", "unimportant", "second", "urgent"):
            await _until_ended(engine, name, 1)
    assert [name for name, _, step in steps.ran if step == 1] == ["first", "urgent", "second", "unimportant"]
