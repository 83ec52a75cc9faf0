"""CoTrain streams as their server sees them: a process each, a limit on their number, and a sure end."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from granq.v1 import common_pb2, generator_pb2
from services.common.errors import InternalError, ResourceExhaustedError, UnavailableError, from_failure
from services.common.jobs import wire
from services.common.jobs.wire import Frame, StartFrame
from services.common.logs import get_logger
from services.generator.settings import GeneratorSettings

_log = get_logger(__name__)


class JointSession:
    """One stream's process. Messages go in and out unread.

    Args:
        process: The process, with pipes on standard input and output.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise InternalError("the process has no pipes")
        self._process = process
        self._stdin, self._stdout = process.stdin, process.stdout

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
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "services.generator.joint_process",
                str(os.getpid()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # The process finds modules where this one does, whatever its working folder is.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                start_new_session=True,
            )
        except OSError as error:
            raise UnavailableError("the server cannot start a process now", reason="NO_PROCESS") from error
        session = cls(process)
        try:
            await session._write(wire.encode(Frame.START, start.model_dump_json().encode()))
            await session._write(wire.encode(Frame.REQUEST, opening.SerializeToString()))
        except BaseException:
            # Cancelled before anyone else knows of the process.
            await asyncio.shield(session.close())
            raise
        return session

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def _write(self, frame: bytes) -> None:
        # A process that is gone takes nothing; `receive` tells how it ended.
        with suppress(ConnectionError):
            self._stdin.write(frame)
            await self._stdin.drain()

    async def send(self, request: generator_pb2.CoTrainRequest) -> None:
        """Pass one message of the client on."""
        await self._write(wire.encode(Frame.REQUEST, request.SerializeToString()))

    async def end(self) -> None:
        """Say that the client sends no more; the process answers what it was sent, and leaves."""
        self._stdin.close()

    async def receive(self) -> generator_pb2.CoTrainResponse | None:
        """Wait for the next message to the client; None after the last.

        Raises:
            GranqError: What ended the training.
            UnavailableError: The process died; reason CO_TRAIN_PROCESS_DIED.
        """
        frame = await wire.read_async(self._stdout)
        if frame is not None and frame[0] is Frame.RESULT:
            return generator_pb2.CoTrainResponse.FromString(frame[1])
        if frame is not None:
            raise from_failure(common_pb2.Failure.FromString(frame[1]))
        code = await self._process.wait()
        if code == 0:
            return None
        raise UnavailableError(
            f"the process of the joint training died (code {code}); open a stream from the last saved state",
            reason="CO_TRAIN_PROCESS_DIED",
        )

    async def close(self) -> None:
        """End the process now, if it is still there."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._stdin.close()
        await self._process.wait()


class JointSessions:
    """The CoTrain streams of one server.

    Args:
        settings: Of the server.
    """

    def __init__(self, settings: GeneratorSettings) -> None:
        self._settings = settings
        self._active = 0

    @property
    def active(self) -> int:
        """Streams that are served now."""
        return self._active

    @asynccontextmanager
    async def open(self, opening: generator_pb2.CoTrainOpen) -> AsyncIterator[JointSession]:
        """Serve one stream; its process ends with the block.

        Raises:
            ResourceExhaustedError: CO_TRAIN_LIMIT when the server serves its maximum.
        """
        limit = self._settings.max_co_train_streams
        if self._active >= limit:
            raise ResourceExhaustedError(
                f"the server already serves {limit} joint trainings, its maximum; try again later",
                reason="CO_TRAIN_LIMIT",
            )
        self._active += 1
        try:
            session = await JointSession.spawn(opening, self._settings)
            _log.info("joint training began", job_id=opening.key.job_id, pipeline_id=opening.key.pipeline_id)
            try:
                yield session
            finally:
                # Shielded, so that a cancelled stream too is sure to leave no process behind.
                await asyncio.shield(session.close())
                _log.info("joint training ended", job_id=opening.key.job_id, pipeline_id=opening.key.pipeline_id)
        finally:
            self._active -= 1
