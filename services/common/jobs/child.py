"""Entry of a job's process: `python -m services.common.jobs.child SERVER_PID`, frames on standard input and output.

What a job needs (torch) is imported by the job's own module; this one stays light.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, BinaryIO

from granq.v1 import jobs_pb2
from services.common import tracing
from services.common.artifacts import ArtifactStore
from services.common.errors import CancelledError, InternalError, UnavailableError, to_failure
from services.common.jobs import wire
from services.common.jobs.context import JobContext
from services.common.jobs.lease import Lease, LeaseLostError
from services.common.jobs.reading import limited_reading
from services.common.jobs.records import JobRecords
from services.common.jobs.wire import Frame, StartFrame
from services.common.logs import configure_logging, get_logger
from services.common.metrics import Sums, sums_since, take_sums
from services.common.settings import ServerSettings

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its server ends, however that ends.

    SIGKILL, because it also ends a stopped process and one that is deep in native code.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It ended before the call above.
        os._exit(1)


def resolve(path: str) -> Any:
    """Return the object that a dotted path such as "package.module:name" names."""
    module, _, name = path.partition(":")
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target


class Outlet:
    """Sends frames to the server."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._told: Sums = {}

    def send(self, kind: Frame, payload: bytes) -> None:
        """Send one frame, and before it what was counted since the last one."""
        with self._lock:
            sums = take_sums()
            if since := sums_since(sums, self._told):
                self._stream.write(wire.encode(Frame.SUMS, json.dumps(since).encode()))
                self._told = sums
            self._stream.write(wire.encode(kind, payload))
            self._stream.flush()


class Orders:
    """What this process was told."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        """By anyone: the server's end, too."""
        self.cancel = threading.Event()
        """The job is not wanted any more, here or elsewhere."""


def listen(inlet: BinaryIO, orders: Orders) -> None:
    """Take the server's frames until it is gone, which ends this process."""
    while (frame := wire.read(inlet)) is not None:
        if frame[0] is Frame.CANCEL:
            orders.cancel.set()
            orders.stop.set()
    os._exit(1)


def take_lease(lease: Lease, start: StartFrame, context: JobContext, orders: Orders) -> jobs_pb2.JobResult | None:
    """Wait for the right to run the job; return its result where another worker finished it meanwhile."""

    def wait() -> None:
        context.report("waiting for the worker that runs this job")
        if orders.cancel.is_set():
            # That worker was not told: whoever cancels knows only of this one.
            lease.revoke()
        if orders.stop.is_set():
            raise CancelledError("the job was asked to stop")

    if not lease.take(wait):
        return None
    found = JobRecords(context.store).load_success(start.job_id)
    return found[0].result if found is not None else None


def _lost() -> bytes:
    error = UnavailableError("another worker has taken this job over", reason="LEASE_LOST")
    return to_failure(error).SerializeToString()


def _run(
    start: StartFrame, request: bytes, settings: ServerSettings, outlet: Outlet, orders: Orders
) -> jobs_pb2.JobResult:
    store = ArtifactStore.of(settings)
    lease = Lease(store, start.job_id, start.run_id, settings.lease_seconds)
    context = JobContext(
        start.job_id,
        start.pipeline_id,
        store,
        settings,
        get_logger("services.common.jobs").bind(job_id=start.job_id, pipeline_id=start.pipeline_id),
        lambda progress: outlet.send(Frame.PROGRESS, progress.SerializeToString()),
        orders.stop,
        partial(limited_reading, settings, lambda field: outlet.send(Frame.READING, field.encode())),
        lease.check,
    )
    message = resolve(start.request).FromString(request)
    function: Callable[[Any, JobContext], object] = resolve(start.function)
    try:
        found = take_lease(lease, start, context, orders)
        if found is not None:
            return found

        def leave() -> None:
            outlet.send(Frame.FAILURE, _lost())
            os._exit(0)

        lease.keep(leave)
        context.check_cancelled()
        result = function(message, context)
    finally:
        context.end_phase()
    if not isinstance(result, jobs_pb2.JobResult):
        raise InternalError(f"{start.function} returned {type(result).__name__}, not a JobResult")
    context.flush()
    return result


def run(start: StartFrame, request: bytes, outlet: Outlet, orders: Orders) -> None:
    """Run the job function and send how it ended."""
    log = get_logger("services.common.jobs")
    try:
        settings_class: type[ServerSettings] = resolve(start.settings)
        settings = settings_class.model_validate_json(start.settings_json)
        fields = {"job_id": start.job_id, "pipeline_id": start.pipeline_id, "job_kind": start.kind}
        configure_logging(settings.log_format, settings.log_level, fields)
        tracing.take_over(start.trace)
        with tracing.span(f"run {start.kind}", start.trace, granq_job_id=start.job_id):
            result = _run(start, request, settings, outlet, orders)
    except CancelledError:
        log.info("job stopped on request")
        outlet.send(Frame.FAILURE, to_failure(CancelledError("the job was asked to stop")).SerializeToString())
    except LeaseLostError:
        outlet.send(Frame.FAILURE, _lost())
    except BaseException as error:  # Whatever ended the job, SystemExit too, the server must hear of it.
        log.exception("job failed")
        outlet.send(Frame.FAILURE, to_failure(error).SerializeToString())
    else:
        outlet.send(Frame.RESULT, result.SerializeToString())


def main() -> None:
    """Run one job and end."""
    die_with_parent(int(sys.argv[1]))
    # The server alone decides when a job ends, so Ctrl-C at the terminal is not for this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    orders = Orders()
    # A handler may interrupt itself, or the event's own wait, whose lock it would then wait for without end. So it
    # writes a byte, and a thread sets the event.
    told, tell = os.pipe()
    os.set_blocking(tell, False)

    def stop(_number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it has been told often enough
            os.write(tell, b"\0")

    def obey() -> None:
        while os.read(told, 64):
            orders.stop.set()

    threading.Thread(target=obey, daemon=True, name="signals").start()
    signal.signal(signal.SIGTERM, stop)
    inlet = os.fdopen(os.dup(0), "rb")
    outlet = Outlet(os.fdopen(os.dup(1), "wb"))
    # What libraries print goes to the log, not between the frames, and what they read is empty.
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    first, second = wire.read(inlet), wire.read(inlet)
    if first is None or second is None:
        os._exit(1)
    threading.Thread(target=listen, args=(inlet, orders), daemon=True, name="server").start()
    run(StartFrame.model_validate_json(first[1]), second[1], outlet, orders)
    tracing.shutdown_tracing()
    sys.stdout.flush()
    sys.stderr.flush()
    # The job has told its end; threads that it left behind must not hold the process.
    os._exit(0)


if __name__ == "__main__":
    main()
