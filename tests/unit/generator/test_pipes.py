"""The pipes between the generator's server and the process of a joint training."""

import asyncio
import os
import subprocess
import sys

import pytest

from services.common.jobs.wire import Frame
from services.generator.pipes import FramePipes

_ECHO = """
import os, sys
from services.common.jobs import wire
inlet, outlet = os.fdopen(0, "rb"), os.fdopen(1, "wb")
while (frame := wire.read(inlet)) is not None:
    wire.write(outlet, *frame)
"""


def _process(pipes: FramePipes, code: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=pipes.child_in, stdout=pipes.child_out, env=environment
    )
    pipes.drop_child_ends()
    return process


async def test_frames_come_back_whole_and_in_order_until_the_end() -> None:
    pipes = FramePipes()
    with _process(pipes, _ECHO):
        sent = [b"", b"small", os.urandom(9_000_000), b"last"]
        writing = asyncio.ensure_future(asyncio.gather(*(pipes.write(Frame.REQUEST, payload) for payload in sent)))
        assert [await pipes.read() for _ in sent] == [(Frame.REQUEST, payload) for payload in sent]
        await writing
        await pipes.end()
        assert await pipes.read() is None
        pipes.close()
        pipes.close()


async def test_a_process_that_is_gone_takes_and_gives_nothing() -> None:
    pipes = FramePipes()
    with _process(pipes, "pass") as process:
        assert await pipes.read() is None
        process.wait()
        with pytest.raises(ConnectionError):
            await pipes.write(Frame.REQUEST, b"x")
        await pipes.end()
        pipes.close()


async def test_a_blocked_read_ends_with_the_process() -> None:
    pipes = FramePipes()
    with _process(pipes, "import time; time.sleep(600)") as process:
        reading = asyncio.create_task(pipes.read())
        await asyncio.sleep(0)
        pipes.close()
        process.kill()
        assert await reading is None
