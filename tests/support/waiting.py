"""Waiting for what happens elsewhere: polls with a deadline, never a fixed sleep."""

import asyncio
import time
from collections.abc import Callable

import psutil

PAUSE = 0.02


async def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    """Return when the condition holds; fail after the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(PAUSE)


def is_gone(pid: int) -> bool:
    """Return whether no such process runs; a zombie nobody has collected yet does not run."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
