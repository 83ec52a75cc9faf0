"""One job's process as its server sees it: begun, listened to, asked to stop, and surely ended."""

import asyncio
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from google.protobuf.message import Message

from granq.v1 import common_pb2, jobs_pb2
from services.common.errors import GranqError, InternalError, UnavailableError, as_granq_error, from_failure
from services.common.jobs import wire
from services.common.jobs.reading import death_while_reading
from services.common.jobs.scratch import Scratch
from services.common.jobs.wire import ENDS, Frame, StartFrame
from services.common.metrics import add_sums
from services.common.settings import ServerSettings
from services.common.tracing import handover

_TAIL_BYTES = 16 * 1024
_CHUNK = 64 * 1024
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024**2), "MALLOC_TRIM_THRESHOLD_": str(512 * 1024**2)}
# After a job has told its end its process only has to leave.
_LEAVE_SECONDS = 5.0


def dotted(cls: type) -> str:
    """Return the path under which another process finds a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def child_environment() -> dict[str, str]:
    """Return the environment of a process that computes for this server.

    It finds modules where this process does, whatever its working folder is. Idle OpenMP threads sleep instead of
    spinning, unless the operator chose otherwise: while they spin, two jobs on the same cores slow each other tenfold.
    Waking them costs a job of small layers that has the cores to itself about a sixth of its speed. Memory that was
    freed is kept for the next iteration (glibc's allocator): given back, it comes page by page anew, which takes longer
    than copying a batch does.
    """
    modules = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return {"OMP_WAIT_POLICY": "PASSIVE", **_KEEP_FREED_MEMORY, **os.environ, "PYTHONPATH": modules}


def _signal_group(pid: int, number: signal.Signals) -> None:
    # PermissionError: the group is being taken down and has nobody left who could be told.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


class _Protocol(asyncio.subprocess.SubprocessStreamProtocol):
    """Ends what a job's process began as soon as that process is gone: it would hold the pipes, and the GPU."""

    def __init__(self) -> None:
        super().__init__(limit=_CHUNK, loop=asyncio.get_running_loop())
        self._pid: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if isinstance(transport, asyncio.SubprocessTransport):
            self._pid = transport.get_pid()

    def process_exited(self) -> None:
        if self._pid is not None:
            _signal_group(self._pid, signal.SIGKILL)
        super().process_exited()


class JobProcess:
    """A spawned process that runs one job function. Not forked: this process has threads of gRPC.

    Args:
        kind: Kind of the job.
        process: The process, with pipes on its three standard streams.
        scratch: Its folder for temporary files, which goes when it does: a killed process cannot remove its own.
        read_seconds: Limit that the process has for reading a file from outside.
    """

    def __init__(self, kind: str, process: asyncio.subprocess.Process, scratch: Scratch, read_seconds: float) -> None:
        self._kind = kind
        self._read_seconds = read_seconds
        self._reading = ""
        self._process = process
        self._scratch = scratch
        self._tail: deque[bytes] = deque()
        self._tail_size = 0

    @classmethod
    async def spawn(
        cls, kind: str, function: str, key: jobs_pb2.JobKey, request: Message, settings: ServerSettings, run_id: str
    ) -> "JobProcess":
        """Begin a job's process and hand it the request.

        Raises:
            ResourceExhaustedError: The disk for temporary files is full.
            UnavailableError: The system has no room for another process.
        """
        start = StartFrame(
            job_id=key.job_id,
            pipeline_id=key.pipeline_id,
            kind=kind,
            function=function,
            request=dotted(type(request)),
            settings=dotted(type(settings)),
            run_id=run_id,
            settings_json=settings.model_dump_json(),
            trace=handover(),
        )
        scratch: Scratch | None = None
        try:
            scratch = await asyncio.to_thread(Scratch)
            transport, protocol = await asyncio.get_running_loop().subprocess_exec(
                _Protocol,
                sys.executable,
                "-P",
                "-m",
                "services.common.jobs.child",
                str(os.getpid()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**child_environment(), "TMPDIR": str(scratch.path)},
                # A group of its own: signals to the server's group are not for it, and it ends with all it began.
                start_new_session=True,
            )
        except OSError as error:
            if scratch is not None:
                scratch.remove()
            cannot = UnavailableError("the server cannot start a process now", reason="NO_PROCESS")
            raise as_granq_error(error) or cannot from error
        made = asyncio.subprocess.Process(transport, protocol, asyncio.get_running_loop())
        job = cls(kind, made, scratch, settings.read_seconds)
        frames = wire.encode(Frame.START, start.model_dump_json().encode())
        job._send(frames + wire.encode(Frame.REQUEST, request.SerializeToString()))
        return job

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its process group."""
        return self._process.pid

    @property
    def log_tail(self) -> str:
        """The last 16 KiB of what the process wrote to its standard error; for the log, never for users."""
        return b"".join(self._tail)[-_TAIL_BYTES:].decode(errors="replace")

    def _send(self, frames: bytes) -> None:
        # Not drained: a stopped process would hold up its server, and a dead one is noticed by `result`.
        if self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(frames)

    def ask_to_stop(self) -> None:
        """Have the job's next check of cancellation end it."""
        self._send(wire.encode(Frame.CANCEL))

    def terminate(self) -> None:
        """As `ask_to_stop`, by SIGTERM, for the process and all that it began."""
        if self._process.returncode is None:
            _signal_group(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the process and all that it began; does nothing once it has ended."""
        if self._process.returncode is None:
            _signal_group(self.pid, signal.SIGKILL)

    async def result(self, on_progress: Callable[[jobs_pb2.Progress], None]) -> jobs_pb2.JobResult:
        """Listen until the process has ended, and return what the job returned.

        Raises:
            GranqError: What the job function raised, or what the file that it read when it died must be.
            UnavailableError: The process was ended by a signal; reason JOB_PROCESS_DIED.
            InternalError: The process left without a word; reason JOB_PROCESS_EXITED.
        """
        errors = asyncio.create_task(self._forward_errors())
        try:
            outcome = await self._listen(on_progress)
            if outcome is not None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), _LEAVE_SECONDS)
                self.kill()
            code = await self._process.wait()
        finally:
            # Also on the way out of a cancelled task: no process outlives its run.
            self.kill()
            if self._process.stdin is not None:
                self._process.stdin.close()
            await asyncio.wait([errors], timeout=_LEAVE_SECONDS)
            errors.cancel()
            await asyncio.to_thread(self._scratch.remove)
        if isinstance(outcome, jobs_pb2.JobResult):
            return outcome
        raise outcome or death_while_reading(code, self._reading, self._read_seconds) or _death(code)

    async def _listen(self, on_progress: Callable[[jobs_pb2.Progress], None]) -> jobs_pb2.JobResult | GranqError | None:
        stream = self._process.stdout
        while stream is not None and (frame := await wire.read_async(stream)) is not None:
            kind, payload = frame
            if kind is Frame.PROGRESS:
                on_progress(jobs_pb2.Progress.FromString(payload))
            elif kind is Frame.READING:
                self._reading = payload.decode()
            elif kind is Frame.SUMS:
                add_sums(self._kind, json.loads(payload))
            elif kind in ENDS:
                if kind is Frame.RESULT:
                    return jobs_pb2.JobResult.FromString(payload)
                return from_failure(common_pb2.Failure.FromString(payload))
        return None

    async def _forward_errors(self) -> None:
        stream = self._process.stderr
        while stream is not None and (data := await stream.read(_CHUNK)):
            sys.stderr.write(data.decode(errors="replace"))
            sys.stderr.flush()
            self._tail.append(data)
            self._tail_size += len(data)
            while self._tail_size - len(self._tail[0]) >= _TAIL_BYTES:
                self._tail_size -= len(self._tail.popleft())


def _death(code: int) -> GranqError:
    if code >= 0:
        return InternalError(f"the job's process left with exit code {code}", reason="JOB_PROCESS_EXITED")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (memory that ran out is a common cause)" if -code == signal.SIGKILL else ""
    return UnavailableError(
        f"the job's process was ended by {name}{hint}; start the job again to go on from its last checkpoint",
        reason="JOB_PROCESS_DIED",
    )
