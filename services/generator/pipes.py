"""Frames to and from a process through pipes, megabytes at a time.

asyncio's own streams move 64 KiB a time and copy what they read three times over, which costs more than gRPC does for
the same batch. A thread that blocks on a pipe reads straight into the message and writes straight out of it.
"""

import asyncio
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar, TypeVarTuple

from services.common.jobs import wire
from services.common.jobs.wire import Frame

_T = TypeVar("_T")
_Arguments = TypeVarTuple("_Arguments")
# What a user without privileges may ask for, by the kernel's default.
_PIPE_BYTES = 1024 * 1024


class FramePipes:
    """A pipe and a thread for each direction.

    Attributes:
        child_in: The process's end to read from; pass it on as its standard input, then call `drop_child_ends`.
        child_out: The process's end to write to.

    Raises:
        OSError: The system has no room for more pipes.
    """

    def __init__(self) -> None:
        self.child_in, outlet = os.pipe()
        try:
            inlet, self.child_out = os.pipe()
        except OSError:
            os.close(self.child_in)
            os.close(outlet)
            raise
        self._inlet, self._outlet = os.fdopen(inlet, "rb"), os.fdopen(outlet, "wb")
        for end in (inlet, outlet):
            # Larger pipes mean fewer switches between the processes; smaller ones work as well.
            with suppress(OSError):
                fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._closed = False
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pipe-in")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pipe-out")

    def drop_child_ends(self) -> None:
        """Close the process's ends here, so that its end is seen as the pipes' end."""
        os.close(self.child_in)
        os.close(self.child_out)

    async def write(self, kind: Frame, payload: bytes) -> None:
        """Send one frame.

        Raises:
            ConnectionError: The process is gone.
        """
        await self._in(self._writer, wire.write, self._outlet, kind, payload)

    async def read(self) -> tuple[Frame, bytes] | None:
        """Wait for the next frame; None when the process sends no more."""
        return await self._in(self._reader, wire.read, self._inlet)

    async def end(self) -> None:
        """Show the process that no more comes."""
        with suppress(ConnectionError):
            await self._in(self._writer, self._outlet.close)

    def close(self) -> None:
        """Let both threads end. They do when the process is gone, which wakes those that still wait for it."""
        if self._closed:
            return
        self._closed = True
        # On their own threads, because what another thread reads from must not be closed under it.
        self._reader.submit(self._inlet.close)
        self._writer.submit(self._outlet.close)
        for thread in (self._reader, self._writer):
            thread.shutdown(wait=False)

    @staticmethod
    def _in(
        thread: ThreadPoolExecutor, function: Callable[[*_Arguments], _T], *arguments: *_Arguments
    ) -> "asyncio.Future[_T]":
        return asyncio.get_running_loop().run_in_executor(thread, function, *arguments)
