"""Slots go to who is next, and none is lost."""

import asyncio

import pytest

from services.common.slots import Place, Slots


async def test_waiters_go_by_their_place_and_then_by_their_arrival() -> None:
    slots, order = Slots(1), []

    async def take(name: str, place: Place) -> None:
        async with slots.hold(place):
            order.append(name)
            await asyncio.sleep(0)

    await slots.acquire()
    tasks = []
    for name, place in (("a", (0, 5)), ("b", (-1, 9)), ("c", (0, 5)), ("d", (0, 1)), ("e", (-1, 2))):
        tasks.append(asyncio.create_task(take(name, place)))
        await asyncio.sleep(0)
    slots.release()
    await asyncio.gather(*tasks)
    assert order == ["e", "b", "d", "a", "c"]


@pytest.mark.parametrize("when", ["while it waits", "when it is given"])
async def test_who_leaves_the_queue_takes_no_slot_along(when: str) -> None:
    slots = Slots(1)
    await slots.acquire()
    leaving, staying = (asyncio.create_task(slots.acquire()) for _ in range(2))
    await asyncio.sleep(0)
    if when == "while it waits":
        leaving.cancel()
        await asyncio.wait({leaving})
        slots.release()
    else:
        slots.release()
        leaving.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait({leaving, staying})
    assert leaving.cancelled()
    await staying
    slots.release()
    async with asyncio.timeout(5):
        await slots.acquire()


async def test_no_more_than_allowed_and_as_many_as_allowed() -> None:
    slots, running, most = Slots(3), 0, 0

    async def work(number: int) -> None:
        nonlocal running, most
        async with slots.hold((number % 4, 0)):
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            running -= 1

    await asyncio.gather(*(work(number) for number in range(50)))
    assert (most, running) == (3, 0)
