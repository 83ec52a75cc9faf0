"""Passes a job's progress on to a pipeline's events, thinned out."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from granq.v1 import jobs_pb2
from services.common.errors import GranqError
from services.coordinator.transitions import JobCursor

Write = Callable[[jobs_pb2.Progress, JobCursor], Awaitable[None]]

_LEAST_SECONDS = 0.5
_MOST_SECONDS = 5.0
_EVENTS_PER_JOB = 500


class ProgressRelay:
    """Writes the progress of one job: each new phase at once, steps at most twice a second, and always the latest.

    Long jobs get rarer events (up to 5 s apart), so that a training of a day does not leave a hundred thousand of them.

    Args:
        write: Stores one progress.
        label: Put before each phase; empty for none.

    Use as an async context manager: what is still held back is written at its end.
    """

    def __init__(self, write: Write, label: str = "") -> None:
        self._write = write
        self._label = label
        self._phase: str | None = None
        self._last: jobs_pb2.Progress | None = None
        self._held: tuple[jobs_pb2.Progress, JobCursor] | None = None
        self._began = self._written = time.monotonic()
        self._timer: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    async def add(self, progress: jobs_pb2.Progress, cursor: JobCursor) -> None:
        """Take over the latest progress.

        Raises:
            Exception: Whatever the write of an earlier progress raised.
        """
        if self._timer is not None and self._timer.done():
            timer, self._timer = self._timer, None
            await timer
        shown = jobs_pb2.Progress()
        shown.CopyFrom(progress)
        if self._label:
            shown.phase = f"{self._label}: {progress.phase}" if progress.phase else self._label
        new_phase, self._phase = progress.phase != self._phase, progress.phase
        if self._held is None and shown == self._last:
            return  # the event that ends a job repeats its last progress
        self._held = (shown, cursor)
        wait = self._written + self._interval() - time.monotonic()
        if new_phase or wait <= 0:
            await self.flush()
        elif self._timer is None:
            self._timer = asyncio.create_task(self._flush_later(wait))

    def _interval(self) -> float:
        return min(_MOST_SECONDS, max(_LEAST_SECONDS, (time.monotonic() - self._began) / _EVENTS_PER_JOB))

    async def _flush_later(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.flush()

    async def flush(self) -> None:
        """Write what is held back, if anything is."""
        async with self._lock:
            held, self._held = self._held, None
            if held is not None:
                self._written, self._last = time.monotonic(), held[0]
                await self._write(*held)

    async def __aenter__(self) -> "ProgressRelay":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            await asyncio.gather(timer, return_exceptions=True)
        # A failed job's last step is worth knowing; a cancelled caller must not be held up.
        if kind is None or issubclass(kind, GranqError):
            await self.flush()
