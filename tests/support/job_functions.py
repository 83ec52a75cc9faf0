"""Job functions that behave and misbehave; run in processes of their own by the tests of services.common.jobs."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from granq.v1 import generator_pb2, jobs_pb2, reports_pb2
from services.common.errors import DataLossError, FailedPreconditionError, InvalidArgumentError
from services.common.jobs import JobContext

Request = generator_pb2.StartSynthesizeRequest


def _result(images: int, seconds: float = 0) -> jobs_pb2.JobResult:
    return jobs_pb2.JobResult(synthesis=reports_pb2.SynthesisResult(num_images=images, seconds=seconds))


def count(request: Request, context: JobContext) -> jobs_pb2.JobResult:
    """Report as many steps as the request has iterations, and say whether torch was loaded."""
    total = request.synthesis.iterations
    sys.stdout.write("noise on standard output\n")
    context.log.info("counting", total=total)
    for step in range(1, total + 1):
        context.check_cancelled()
        context.report("counting", step, total, loss_test=1 / step, iterations_per_second=100)
    context.report("leaving")
    context.store.put_bytes(b"0123456789")
    return _result(total, float("torch" in sys.modules))


def until_cancelled(request: Request, context: JobContext) -> jobs_pb2.JobResult:
    """Check for cancellation, and nothing else."""
    context.report("waiting", step=os.getpid())
    pause = threading.Event()
    while True:
        context.check_cancelled()
        pause.wait(0.01)


def until_told(request: Request, context: JobContext) -> jobs_pb2.JobResult:
    """Append a letter to a file, and wait until the file "told" is there."""
    once_with_side_effect(request, context)
    context.report("working", step=os.getpid())
    pause = threading.Event()
    while not Path(context.settings.cache_dir, "told").exists():
        context.check_cancelled()
        pause.wait(0.01)
    return _result(1)


def never_checks(request: Request, context: JobContext) -> jobs_pb2.JobResult:
    """Wait for ever in a process that also ignores SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    context.report("deaf", step=os.getpid())
    threading.Event().wait()
    raise AssertionError


def with_grandchild(request: Request, context: JobContext) -> jobs_pb2.JobResult:
    """Begin a process that shares this one's pipes, then wait for ever."""
    grandchild = subprocess.Popen(["sleep", "600"])
    context.report("parent", step=grandchild.pid, total=os.getpid() * 1000)
    threading.Event().wait()
    raise AssertionError


def dies_once(request: Request, context: JobContext) -> jobs_pb2.JobResult:
    """Count to the iterations with a checkpoint after each, and be killed half-way in the first run."""
    total, done, runs = request.synthesis.iterations, 0, 1
    checkpoint = context.load_checkpoint()
    if checkpoint is not None:
        done, runs = map(int, context.store.read_bytes(checkpoint.digest).split())
        runs += 1
    while done < total:
        context.check_cancelled()
        done += 1
        context.save_checkpoint(context.store.put_bytes(f"{done} {runs}".encode()))
        context.report("counting", done, total)
        if runs == 1 and done == total // 2:
            sys.stderr.write("last words\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return _result(done, runs)


def leaves_files(request: Request, context: JobContext) -> jobs_pb2.JobResult:
    """Write a temporary file, and be killed if the request has iterations."""
    folder = Path(tempfile.mkdtemp())
    (folder / "half").write_bytes(b"written")
    context.report(str(folder))
    if request.synthesis.iterations:
        os.kill(os.getpid(), signal.SIGKILL)
    return _result(1)


def fails(request: Request, context: JobContext) -> jobs_pb2.JobResult:
    """End in the way that the model's architecture names."""
    match request.model.architecture:
        case "domain":
            raise FailedPreconditionError("install tensorrt", reason="NO_RUNTIME", field="target.runtime")
        case "loss":
            raise DataLossError("damaged")
        case "defect":
            raise KeyError("secret")
        case "memory":
            raise MemoryError
        case "exit":
            os._exit(7)
        case "system_exit":
            sys.exit(3)
        case "nothing":
            return None  # type: ignore[return-value]
    raise AssertionError


def reads(request: Request, context: JobContext) -> jobs_pb2.JobResult:
    """Read a file that does what the model's architecture names."""
    with context.limits("model.artifact", 0):
        match request.model.architecture:
            case "hangs":
                # In native code that keeps the interpreter's lock, so that no thread of Python's could end it.
                ctypes.PyDLL(None).sleep(600)
            case "fills":
                bytearray(1 << 30)
            case "fills_hidden":
                try:
                    bytearray(1 << 30)
                except MemoryError as error:
                    raise InvalidArgumentError("the file is damaged") from error
            case "crashes":
                ctypes.string_at(0)
            case "aborts":
                os.abort()
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "refused":
                raise InvalidArgumentError("no model", field="model.artifact")
    return _result(len(bytearray(1 << 30)) >> 30)


def once_with_side_effect(request: Request, context: JobContext) -> jobs_pb2.JobResult:
    """Append a letter to a file, to show how often it ran."""
    with Path(context.settings.cache_dir, "ran").open("a") as file:
        file.write("x")
    return _result(1)
