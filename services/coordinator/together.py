"""Several pieces of work side by side, such as jobs on different devices."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

_T = TypeVar("_T")


async def together(works: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Run all at once and return their results in order; the first error ends the others, and is raised.

    The others are cancelled before any of them can take what the failed one leaves, such as a lock.
    """
    tasks: list[asyncio.Task[_T]] = []
    errors: list[BaseException] = []

    async def watched(work: Coroutine[Any, Any, _T]) -> _T:
        try:
            return await work
        except BaseException as error:
            if not errors:
                errors.append(error)
                for task in tasks:
                    task.cancel()
            raise

    tasks.extend(asyncio.ensure_future(watched(work)) for work in works)
    try:
        await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if errors:
        raise errors[0]
    return [task.result() for task in tasks]
