"""CoTrain streams as their server sees them: a process each, a limit on their number, and a sure end."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self

from granq.v1 import common_pb2, generator_pb2
from services.common.errors import ResourceExhaustedError, UnavailableError, from_failure
from services.common.jobs.process import child_environment
from services.common.jobs.reading import death_while_reading
from services.common.jobs.scratch import Scratch
from services.common.jobs.usage import Usage
from services.common.jobs.wire import Frame, StartFrame
from services.common.logs import get_logger
from services.common.metrics import CHILDREN
from services.generator.pipes import FramePipes
from services.generator.settings import GeneratorSettings

PROCESS_MODULE = "services.generator.joint_process"
_log = get_logger(__name__)


class JointSession:
    """One stream's process. Messages go in and out unread.

    Args:
        process: The process.
        pipes: Its standard input and output.
        read_seconds: Limit that the process has for reading a file from outside.
        scratch: Its folder for temporary files; libraries make some. It goes with the process.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, pipes: FramePipes, read_seconds: float, scratch: Scratch
    ) -> None:
        self._process = process
        self._scratch = scratch
        self._read_seconds = read_seconds
        self._reading = ""
        self._pipes = pipes

    @classmethod
    async def spawn(cls, opening: generator_pb2.CoTrainOpen, settings: GeneratorSettings) -> "JointSession":
        """Begin a stream's process.

        Raises:
            UnavailableError: The system has no room for another process.
        """
        start = StartFrame(
            job_id=opening.key.job_id,
            pipeline_id=opening.key.pipeline_id,
            kind="co_train",
            function="",
            request="",
            settings="",
            settings_json=settings.model_dump_json(),
        )
        pipes: FramePipes | None = None
        scratch: Scratch | None = None
        try:
            scratch = await asyncio.to_thread(Scratch)
            pipes = FramePipes()
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                PROCESS_MODULE,
                str(os.getpid()),
                stdin=pipes.child_in,
                stdout=pipes.child_out,
                env={**child_environment(), "TMPDIR": str(scratch.path)},
                start_new_session=True,
            )
        except BaseException as error:
            if pipes is not None:
                pipes.close()
            if scratch is not None:
                scratch.remove()
            if isinstance(error, OSError):
                raise UnavailableError("the server cannot start a process now", reason="NO_PROCESS") from error
            raise
        finally:
            if pipes is not None:
                pipes.drop_child_ends()
        session = cls(process, pipes, settings.read_seconds, scratch)
        try:
            await session._write(Frame.START, start.model_dump_json().encode())
            await session._write(Frame.REQUEST, opening.SerializeToString())
        except BaseException:
            # Cancelled before anyone else knows of the process.
            await asyncio.shield(session.close())
            raise
        return session

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def _write(self, kind: Frame, payload: bytes) -> None:
        # A process that is gone takes nothing; `receive` tells how it ended.
        with suppress(ConnectionError):
            await self._pipes.write(kind, payload)

    async def send(self, request: generator_pb2.CoTrainRequest) -> None:
        """Pass one message of the client on."""
        await self._write(Frame.REQUEST, request.SerializeToString())

    async def end(self) -> None:
        """Say that the client sends no more; the process answers what it was sent, and leaves."""
        await self._pipes.end()

    async def receive(self) -> bytes | None:
        """Wait for the next message to the client, a serialized CoTrainResponse; None after the last.

        Raises:
            GranqError: What ended the training.
            UnavailableError: The process died; reason CO_TRAIN_PROCESS_DIED.
        """
        frame = await self._pipes.read()
        while frame is not None and frame[0] is Frame.READING:
            self._reading = frame[1].decode()
            frame = await self._pipes.read()
        if frame is not None and frame[0] is Frame.RESULT:
            return frame[1]
        if frame is not None:
            raise from_failure(common_pb2.Failure.FromString(frame[1]))
        code = await self._process.wait()
        if code == 0:
            return None
        if (known := death_while_reading(code, self._reading, self._read_seconds)) is not None:
            raise known
        raise UnavailableError(
            f"the process of the joint training died (code {code}); open a stream from the last saved state",
            reason="CO_TRAIN_PROCESS_DIED",
        )

    async def close(self) -> None:
        """End the process now, if it is still there."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._pipes.close()
        await self._process.wait()
        await asyncio.to_thread(self._scratch.remove)


class JointSessions:
    """The CoTrain streams of one server. A context manager: at its end no process is left.

    Args:
        settings: Of the server.
        usage: Told that the server is in use while a stream is open.
    """

    def __init__(self, settings: GeneratorSettings, usage: Usage) -> None:
        self._settings = settings
        self._usage = usage
        self._places = asyncio.Semaphore(settings.max_co_train_streams)
        self._sessions: set[JointSession] = set()
        self._endings: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self, opening: generator_pb2.CoTrainOpen) -> AsyncIterator[JointSession]:
        """Serve one stream; its process ends with the block.

        Waits a little for a place, because whoever resumes comes while the broken stream is still being taken down.

        Raises:
            ResourceExhaustedError: CO_TRAIN_LIMIT when the server serves its maximum.
        """
        log = _log.bind(job_id=opening.key.job_id, pipeline_id=opening.key.pipeline_id)
        try:
            async with asyncio.timeout(self._settings.co_train_wait_seconds):
                await self._places.acquire()
        except TimeoutError as error:
            raise ResourceExhaustedError(
                f"the server already serves its maximum of {self._settings.max_co_train_streams} joint trainings; "
                "try again later",
                reason="CO_TRAIN_LIMIT",
            ) from error
        try:
            session = await JointSession.spawn(opening, self._settings)
        except BaseException:
            self._places.release()
            raise
        self._sessions.add(session)
        log.info("joint training began")
        try:
            with CHILDREN.watched(session.pid, "co_train"), self._usage.used():
                yield session
        finally:
            # A task of its own, so that a stream that is cancelled again meanwhile still leaves no process behind.
            ending = asyncio.create_task(self._end(session))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
            await asyncio.shield(ending)
            log.info("joint training ended")

    async def _end(self, session: JointSession) -> None:
        try:
            await session.close()
        finally:
            self._sessions.discard(session)
            self._places.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(session.close() for session in self._sessions), *self._endings)
