"""Watching: every event once and in order, from anywhere, by many, and from other processes."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import patch

import pytest
from sqlalchemy import delete

from granq.v1 import coordinator_pb2
from services.common.errors import NotFoundError
from services.coordinator.calls import DatabaseCalls
from services.coordinator.hub import EventHub
from services.coordinator.requests import Stage
from services.coordinator.tables import PipelineRow
from services.coordinator.threads import Threads
from services.coordinator.transitions import JobCursor
from tests.support.pipelines import Database, progress, sqlite_url

NOTHING = coordinator_pb2.PipelineResults()


class Watched:
    """A database whose changes wake a hub."""

    def __init__(self, folder: Path, threads: Threads, poll_seconds: float = 60) -> None:
        self.url = sqlite_url(folder)
        self.database = Database(self.url, lambda name: self.hub.changed(name))
        self.hub = EventHub(self.database.repository, DatabaseCalls(threads), poll_seconds)
        self.name = self.database.create()

    def advance(self, steps: int, first: int = 0) -> None:
        for step in range(first, first + steps):
            self.database.transitions.record_progress(self.name, 1, progress(step), "job", JobCursor())

    def end(self) -> None:
        self.database.transitions.finish_stage(self.name, 1, Stage.STAGE_REPORT, NOTHING, last=True)

    async def collect(self, after: int = 0) -> list[int]:
        return [event.sequence async for event in self.hub.watch(self.name, after)]


@pytest.fixture
async def watched(tmp_path: Path, threads: Threads) -> AsyncIterator[Watched]:
    made = Watched(tmp_path, threads)
    made.database.transitions.enter_stage(made.name, 1, Stage.STAGE_QUANTIZE)
    yield made
    await made.hub.close()
    made.database.close()


async def test_past_and_future_come_in_one_stream_without_gaps(watched: Watched, threads: Threads) -> None:
    await threads.call(watched.advance, 300)  # more than the feed remembers
    watcher = asyncio.create_task(watched.collect())
    late = asyncio.create_task(watched.collect(250))
    await threads.call(watched.advance, 40, 300)
    await threads.call(watched.end)
    assert await asyncio.wait_for(watcher, 10) == list(range(1, 344))
    assert await late == list(range(251, 344))
    assert await watched.collect(343) == []
    assert await watched.collect(340) == [341, 342, 343]


async def test_a_watcher_wakes_at_once(watched: Watched, threads: Threads) -> None:
    stream = watched.hub.watch(watched.name, 2)
    following = asyncio.ensure_future(anext(stream))
    await threads.call(watched.advance, 1)
    # The poll of this hub comes after a minute, so only the wake-up can bring it.
    assert (await asyncio.wait_for(following, 5)).sequence == 3


async def test_many_watchers_cost_one_reader(watched: Watched, threads: Threads) -> None:
    reads = 0
    original = watched.database.repository.events

    def counted(name: str, after: int, limit: int) -> list[coordinator_pb2.WatchPipelineResponse]:
        nonlocal reads
        reads += 1
        return original(name, after, limit)

    with patch.object(watched.database.repository, "events", counted):
        watchers = [asyncio.create_task(watched.collect()) for _ in range(200)]
        await asyncio.gather(*(asyncio.wait({watcher}, timeout=0) for watcher in watchers))
        joined = reads
        for step in range(20):
            await threads.call(watched.advance, 1, step)
        await threads.call(watched.end)
        found = await asyncio.wait_for(asyncio.gather(*watchers), 20)
    assert found == [list(range(1, 24))] * 200
    assert reads - joined <= 200 + 21  # each looks once as it joins; each change is read once for all


async def test_changes_of_another_process_are_found(tmp_path: Path, threads: Threads) -> None:
    watched = Watched(tmp_path, threads, poll_seconds=0.05)
    other = Database(watched.url)
    watcher = asyncio.create_task(watched.collect())
    await threads.call(other.transitions.request_cancel, watched.name)
    await threads.call(other.transitions.finish_cancel, watched.name)
    assert await asyncio.wait_for(watcher, 10) == [1, 2, 3]
    await watched.hub.close()
    other.close()
    watched.database.close()


async def test_a_retried_end_is_not_the_end(watched: Watched, threads: Threads) -> None:
    change = watched.database.transitions
    await threads.call(change.request_cancel, watched.name)
    await threads.call(change.finish_cancel, watched.name)
    assert await watched.collect() == [1, 2, 3, 4]
    await threads.call(change.retry, watched.name, "me")
    watcher = asyncio.create_task(watched.collect())
    await threads.call(change.request_cancel, watched.name)
    await threads.call(change.finish_cancel, watched.name)
    assert await asyncio.wait_for(watcher, 10) == list(range(1, 8))


async def test_what_is_not_there_or_goes_away_is_not_found(watched: Watched, threads: Threads) -> None:
    with pytest.raises(NotFoundError):
        await anext(watched.hub.watch("none", 0))
    watcher = asyncio.create_task(watched.collect())
    await threads.call(watched.advance, 1)
    with watched.database.engine.begin() as connection:
        connection.execute(delete(PipelineRow))
    watched.hub.changed(watched.name)
    with pytest.raises(NotFoundError):
        await asyncio.wait_for(watcher, 10)
