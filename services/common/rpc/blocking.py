"""Lets plain (blocking) handlers run in threads under the asynchronous server."""

import asyncio
import contextvars
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from services.common.rpc.call import Context

_END = object()


def is_plain(handler: Callable[..., Any]) -> bool:
    """Return whether a handler blocks: it is neither a coroutine function nor an asynchronous generator."""
    function = inspect.unwrap(handler)
    while hasattr(function, "func"):
        function = function.func
    return not (inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function))


class PlainContext:
    """A context for a handler in a thread: what is a coroutine in the original is a blocking call here."""

    def __init__(self, context: Context, loop: asyncio.AbstractEventLoop) -> None:
        self._context = context
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._context, name)
        if not inspect.iscoroutinefunction(attribute) and name not in ("abort", "read", "write"):
            return attribute

        def wait(*args: Any, **kwargs: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(attribute(*args, **kwargs), self._loop).result()

        return wait


def plain_iterator(messages: AsyncIterator[Any], loop: asyncio.AbstractEventLoop) -> Iterator[Any]:
    """Yield, in a thread, what an asynchronous iterator yields."""

    async def following() -> Any:
        return await anext(messages, _END)

    while (message := asyncio.run_coroutine_threadsafe(following(), loop).result()) is not _END:
        yield message


async def in_thread(
    pool: ThreadPoolExecutor, handler: Callable[..., Any], request: Any, context: Context, request_streams: bool
) -> Any:
    """Call a plain handler in a thread and return what it returns."""
    loop = asyncio.get_running_loop()
    argument = plain_iterator(request, loop) if request_streams else request
    return await loop.run_in_executor(pool, _in_context(handler), argument, PlainContext(context, loop))


async def iterate_in_thread(pool: ThreadPoolExecutor, responses: Iterator[Any]) -> AsyncIterator[Any]:
    """Yield what a plain handler's generator yields, each step in a thread."""
    loop = asyncio.get_running_loop()
    while (response := await loop.run_in_executor(pool, _in_context(next), responses, _END)) is not _END:
        yield response


def _in_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as one that knows in its thread what this task knows: who calls, and what the log carries."""
    return functools.partial(contextvars.copy_context().run, function)
