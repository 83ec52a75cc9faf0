"""Whether anybody uses a worker, and since when nobody has."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Usage:
    """Counts what goes on at a worker. Used from one event loop."""

    def __init__(self) -> None:
        self._users = 0
        self._unused_since = time.monotonic()
        self._left = asyncio.Event()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within the block, the worker is in use."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._unused_since = time.monotonic()
            self._left.set()

    async def unused(self, seconds: float) -> None:
        """Return once nobody has used the worker for so many seconds in a row.

        Nothing comes between that finding and what the caller does next without awaiting.
        """
        while self._users or (rest := self._unused_since + seconds - time.monotonic()) > 0:
            if self._users:
                self._left.clear()
                await self._left.wait()
            else:
                await asyncio.sleep(rest)
