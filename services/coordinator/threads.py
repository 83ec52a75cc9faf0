"""Runs blocking calls (database, artifact store) off the event loop, in a bounded pool of their own."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Threads:
    """A small pool of threads. The event loop's default pool is not used: the workflow engine replaces it.

    Args:
        count: Threads at most.
        name: Prefix of their names.
    """

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def call(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """Return what the function returns; raise what it raises.

        A call that has begun runs to its end, also when its caller is cancelled; the caller then waits for that end, so
        that whatever it does next, such as cleaning up, cannot run beside the call.
        """
        submitted = self._pool.submit(partial(function, *arguments, **named))
        running = asyncio.wrap_future(submitted)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # The pool's own future is asked: asyncio's could be cancelled although the call goes on.
            if not submitted.cancel():
                await asyncio.wait({running})
                if not running.cancelled():
                    running.exception()  # looked at, so that it is not reported as forgotten
            raise

    @asynccontextmanager
    async def ahead(self) -> "AsyncIterator[Ahead]":
        """Let one call go on while the block does something else; it has ended when the block is left."""
        ahead = Ahead(self)
        try:
            yield ahead
        finally:
            await ahead.drop()

    def close(self) -> None:
        """Wait for running calls and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Ahead:
    """At most one call that goes on by itself; what `Threads.ahead` gives."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._task: asyncio.Task[Any] | None = None

    async def then(self, function: Callable[_P, object], *arguments: _P.args, **named: _P.kwargs) -> Any:
        """Begin a call as soon as the one before has ended, and return what that one returned; None at first."""
        before = await self.result()
        self._task = asyncio.create_task(self._threads.call(function, *arguments, **named))
        return before

    async def result(self) -> Any:
        """Wait for the call and return what it returns, or raise what it raises; None where there is none."""
        if self._task is None:
            return None
        try:
            return await asyncio.shield(self._task)
        finally:
            if self._task.done():
                self._task = None

    async def drop(self) -> None:
        """Wait for the call's end, whatever it is."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # looked at, so that it is not reported as forgotten
