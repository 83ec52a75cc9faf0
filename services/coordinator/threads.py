"""Runs blocking calls (database, artifact store) off the event loop, in a bounded pool of their own."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

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
        running = asyncio.get_running_loop().run_in_executor(self._pool, partial(function, *arguments, **named))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if not running.cancel():
                await asyncio.wait({running})
                if not running.cancelled():
                    running.exception()  # looked at, so that it is not reported as forgotten
            raise

    def close(self) -> None:
        """Wait for running calls and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
