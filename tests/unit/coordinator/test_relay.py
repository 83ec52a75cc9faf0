"""Thinned progress: phases at once, steps seldom, the latest always."""

import asyncio
import time

import pytest

from granq.v1 import jobs_pb2
from services.coordinator.relay import ProgressRelay
from services.coordinator.transitions import JobCursor
from tests.support.pipelines import progress


class _Written(list[tuple[str, int, float]]):
    async def write(self, shown: jobs_pb2.Progress, cursor: JobCursor) -> None:
        assert cursor.sequence == shown.step
        self.append((shown.phase, shown.step, time.monotonic()))


async def _add(relay: ProgressRelay, step: int, phase: str = "training") -> None:
    await relay.add(progress(step, phase), JobCursor("run", step))


async def test_a_flood_is_thinned_but_phases_and_the_last_step_are_kept() -> None:
    written = _Written()
    async with ProgressRelay(written.write) as relay:
        for phase in ("warm-up", "training", "exporting"):
            for step in range(500):
                await _add(relay, step, phase)
    shown = [(phase, step) for phase, step, _time in written]
    assert shown == [("warm-up", 0), ("training", 0), ("exporting", 0), ("exporting", 499)]


async def test_a_held_back_step_is_written_when_its_time_comes_not_with_the_next_one() -> None:
    written = _Written()
    async with ProgressRelay(written.write) as relay:
        await _add(relay, 0)
        await _add(relay, 1)
        await _add(relay, 2)
        async with asyncio.timeout(5):
            while len(written) < 2:
                await asyncio.sleep(0.01)
    assert [step for _phase, step, _time in written] == [0, 2]
    assert written[1][2] - written[0][2] >= 0.45


async def test_the_same_progress_is_written_once() -> None:
    written = _Written()
    async with ProgressRelay(written.write) as relay:
        for _ in range(3):
            await _add(relay, 100)
    assert [step for _phase, step, _time in written] == [100]


async def test_labels_are_put_before_phases() -> None:
    written = _Written()
    async with ProgressRelay(written.write, "simulation") as relay:
        await _add(relay, 0, "measuring")
    assert written[0][0] == "simulation: measuring"


async def test_a_failing_write_reaches_the_caller() -> None:
    async def refuse(_shown: jobs_pb2.Progress, _cursor: JobCursor) -> None:
        raise LookupError

    relay = ProgressRelay(refuse)
    with pytest.raises(LookupError):
        await _add(relay, 0)
