"""A limit on how much runs at once, and an order for what waits."""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

Place = tuple[int, int]
"""Place in a queue; the smaller goes first. Among equals, who came first."""


class Slots:
    """A semaphore whose waiters go in an order of their own. Used from one event loop.

    Args:
        count: How many may have a slot at once.

    Example:
        >>> slots = Slots(1)  # doctest: +SKIP
        >>> async with slots.hold((-priority, age)):  # doctest: +SKIP
        ...     ...
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._arrivals = itertools.count()
        self._waiting: list[tuple[Place, int, asyncio.Future[None]]] = []

    async def acquire(self, place: Place = (0, 0)) -> None:
        """Wait for a slot, and take it."""
        if self.take():
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (place, next(self._arrivals), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()  # it was given in the moment in which nobody wanted it any more
            raise

    def take(self) -> bool:
        """Take a slot if one is free and nobody waits for it; return whether."""
        if self._free == 0 or self._next():
            return False
        self._free -= 1
        return True

    async def acquire_unless(self, left: asyncio.Event, place: Place = (0, 0)) -> bool:
        """Wait for a slot, and take it; return False, without one, when the event is set before that."""
        taking = asyncio.create_task(self.acquire(place))
        leaving = asyncio.create_task(left.wait())
        await asyncio.wait((taking, leaving), return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not left.is_set():
            return True
        taking.cancel()
        await asyncio.wait((taking,))
        if not taking.cancelled():
            self.release()
        return False

    def release(self) -> None:
        """Give a slot back; who is next has it at once."""
        self._free += 1
        while self._free > 0 and self._next():
            self._free -= 1
            heapq.heappop(self._waiting)[2].set_result(None)

    def _next(self) -> bool:
        while self._waiting and self._waiting[0][2].done():
            heapq.heappop(self._waiting)  # left the queue
        return bool(self._waiting)

    @asynccontextmanager
    async def hold(self, place: Place = (0, 0)) -> AsyncIterator[None]:
        """Have a slot for the time of a with statement."""
        await self.acquire(place)
        try:
            yield
        finally:
            self.release()
