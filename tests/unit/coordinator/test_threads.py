"""Blocking calls off the event loop, one of them ahead of its caller."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from services.coordinator.threads import Threads


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads(2, "test")
    yield threads
    threads.close()


async def test_results_come_in_order_one_call_later(threads: Threads) -> None:
    async with threads.ahead() as ahead:
        assert await ahead.result() is None
        assert await ahead.then(lambda: 1) is None
        assert await ahead.then(lambda: 2) == 1
        assert await ahead.result() == 2
        assert await ahead.result() is None


async def test_an_error_comes_with_the_next_call_which_is_not_begun(threads: Threads) -> None:
    called: list[int] = []

    def fail() -> None:
        raise OSError("disk")

    async with threads.ahead() as ahead:
        await ahead.then(fail)
        with pytest.raises(OSError, match="disk"):
            await ahead.then(called.append, 1)
    assert called == []


async def test_a_call_has_ended_when_the_block_is_left(threads: Threads) -> None:
    started, release, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        release.wait()
        ended.set()

    async def use() -> None:
        async with threads.ahead() as ahead:
            await ahead.then(work)
            await asyncio.to_thread(started.wait)
            raise KeyError

    using = asyncio.create_task(use())
    await asyncio.to_thread(started.wait)
    await asyncio.wait({using}, timeout=0.05)
    assert not using.done()
    release.set()
    with pytest.raises(KeyError):
        await using
    assert ended.is_set()
