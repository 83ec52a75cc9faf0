"""Spreads a pipeline's events to everybody who watches it.

However many watch, the database is asked once per change: one feed per watched pipeline reads new events and keeps the
latest few in memory. A change made in this process wakes its feed at once; changes by other coordinators on the same
database are found by one query per second for all watched pipelines together, and only while somebody watches.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from functools import partial

from granq.v1 import coordinator_pb2
from services.common.errors import NotFoundError, UnavailableError
from services.common.logs import get_logger
from services.coordinator.calls import DatabaseCalls
from services.coordinator.repository import Repository
from services.coordinator.transitions import ENDED

Event = coordinator_pb2.WatchPipelineResponse
_PAGE = 500
_KEPT = 256

log = get_logger(__name__)


class _Feed:
    """Latest events of one pipeline, shared by its watchers."""

    def __init__(self) -> None:
        self.watchers = 0
        self.events: deque[Event] = deque(maxlen=_KEPT)
        self.last = 0
        self.state = 0
        self.gone = False
        self.moved = asyncio.Condition()
        self.refresh = asyncio.Lock()


class EventHub:
    """Streams of pipeline events.

    Args:
        repository: Where events are.
        calls: Run its calls.
        poll_seconds: Time between looks for changes that other processes made.
    """

    def __init__(self, repository: Repository, calls: DatabaseCalls, poll_seconds: float = 1.0) -> None:
        self._repository = repository
        self._calls = calls
        self._poll_seconds = poll_seconds
        self._feeds: dict[str, _Feed] = {}
        self._poller: asyncio.Task[None] | None = None
        self._refreshes: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._closing = False

    def changed(self, pipeline_id: str) -> None:
        """Wake the watchers of a pipeline; may be called from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to wake
            self._loop.call_soon_threadsafe(self._wake, pipeline_id)

    def _wake(self, pipeline_id: str) -> None:
        feed = self._feeds.get(pipeline_id)
        if feed is not None:
            task = self._loop.create_task(self._refresh(pipeline_id, feed))
            self._refreshes.add(task)
            task.add_done_callback(self._refreshed)

    def _refreshed(self, task: asyncio.Task[None]) -> None:
        self._refreshes.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # Nothing is lost: the poll sees that the feed is behind, and has it refreshed again.
            log.warning("events not read; trying again", error=str(task.exception()))

    async def watch(self, pipeline_id: str, after: int) -> AsyncGenerator[Event, None]:
        """Yield the events behind a number, in order and without gaps, until the pipeline has ended.

        A terminal event that a retry followed is not the end.

        Raises:
            NotFoundError: There is no such pipeline, or it is deleted meanwhile.
        """
        feed = self._feeds.setdefault(pipeline_id, _Feed())
        feed.watchers += 1
        try:
            await self._refresh(pipeline_id, feed)
            self._ensure_poller()
            while True:
                async with feed.moved:
                    await feed.moved.wait_for(partial(self._has_news, feed, after))
                    if self._closing:
                        raise UnavailableError("the coordinator is about to end; watch again", reason="SERVER_STOPPING")
                    if feed.gone:
                        raise NotFoundError(f"there is no pipeline {pipeline_id!r}", field="pipeline_id")
                    last, ended = feed.last, feed.state in ENDED
                    ready = [event for event in feed.events if event.sequence > after]
                if after < last and (not ready or ready[0].sequence != after + 1):
                    # Further back than the feed remembers: a page of history from the database.
                    ready = await self._calls.call(self._repository.events, pipeline_id, after, _PAGE)
                for event in ready:
                    after = event.sequence
                    yield event
                if ended and after >= last:
                    return
        finally:
            feed.watchers -= 1
            if feed.watchers == 0 and self._feeds.get(pipeline_id) is feed:
                del self._feeds[pipeline_id]

    def _has_news(self, feed: _Feed, after: int) -> bool:
        return self._closing or feed.gone or feed.last > after or feed.state in ENDED

    async def _refresh(self, pipeline_id: str, feed: _Feed) -> None:
        async with feed.refresh:
            found = await self._calls.call(self._repository.sequences, [pipeline_id])
            if pipeline_id not in found:
                feed.gone = True
            else:
                last, state = found[pipeline_id]
                # A new feed begins with the last page; whoever wants more of the past reads it for himself.
                begin = max(feed.last, last - _KEPT)
                events = await self._calls.call(self._repository.events, pipeline_id, begin, _KEPT)
                fresh = [event for event in events if event.sequence <= last]
                feed.events.extend(fresh)
                feed.last, feed.state = last, state
            async with feed.moved:
                feed.moved.notify_all()

    def _ensure_poller(self) -> None:
        if self._poller is None or self._poller.done():
            self._poller = self._loop.create_task(self._poll())

    async def _poll(self) -> None:
        while self._feeds:
            await asyncio.sleep(self._poll_seconds)
            try:
                found = await self._calls.call(self._repository.sequences, list(self._feeds))
            except UnavailableError:
                continue  # told where it was raised
            for pipeline_id, feed in self._feeds.items():
                if found.get(pipeline_id, (-1, 0))[0] != feed.last:
                    self._wake(pipeline_id)

    async def close(self) -> None:
        """End all watches with UnavailableError, and stop looking for changes."""
        self._closing = True
        for feed in list(self._feeds.values()):
            async with feed.moved:
                feed.moved.notify_all()
        tasks = [*self._refreshes, *([self._poller] if self._poller is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
