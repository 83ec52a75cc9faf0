"""Limits on a job's process while it reads a file from outside: nobody knows what such a file makes a reader do."""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from granq.v1 import artifacts_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import (
    DataLossError,
    GranqError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    is_out_of_memory,
)
from services.common.settings import ServerSettings

Reading = Callable[[str, int], AbstractContextManager[None]]
"""Begins to read what a request's field names, a file of so many bytes, under limits."""

_BYTES_PER_BYTE = 6
_CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)


def fetched(store: ArtifactStore, field: str, artifact: artifacts_pb2.Artifact) -> Path:
    """Return a local file of what a request's field names.

    Raises:
        NotFoundError: The store does not hold it; names the field.
        DataLossError: The stored bytes do not match its digest; names the field.
    """
    try:
        return store.local_path(artifact.digest)
    except (NotFoundError, DataLossError) as error:
        error.field = field
        raise


def reading_of(
    limits: Reading, store: ArtifactStore, field: str, artifact: artifacts_pb2.Artifact
) -> AbstractContextManager[None]:
    """Fetch what a request's field names, however long that takes, and return the limits to read it under.

    Raises:
        NotFoundError, DataLossError: As `fetched`.
    """
    return limits(field, fetched(store, field, artifact).stat().st_size)


@contextmanager
def limited_reading(
    settings: ServerSettings, tell: Callable[[str], None], field: str, size_bytes: int
) -> Iterator[None]:
    """Read a file with bounded memory and time; in the main thread of a process of its own.

    Memory may grow by `read_memory_bytes` and six times the file's size. The kernel holds both limits, so that they
    bind native code, too: an allocation beyond the first fails, and the second ends the process. Counted is memory
    that this process alone may write to (RLIMIT_DATA), not address space as CUDA reserves it; and the limit is gone
    before a model moves to a GPU.

    Args:
        settings: Have the limits.
        tell: Told the field when reading begins, and "" when it ends; the server then knows what ended the process.
        field: Field of the request that names the file.
        size_bytes: Size of the file; 0 where it is a folder of the server's own.

    Raises:
        ResourceExhaustedError: READ_MEMORY when the file needs more memory.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = _data_bytes() + settings.read_memory_bytes + _BYTES_PER_BYTE * size_bytes
    ceilings = [limit for limit in (allowed, soft, hard) if limit != resource.RLIM_INFINITY]
    # The default action ends the process from within the kernel, whatever native code it is in.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    tell(field)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (min(ceilings), hard))
        signal.setitimer(signal.ITIMER_REAL, settings.read_seconds)
        yield
    except Exception as error:
        # Readers take a failed allocation for damage, so the causes are searched, too.
        if not is_out_of_memory(error):
            raise
        raise ResourceExhaustedError(
            f"reading {field} takes more than {settings.read_memory_bytes} bytes and {_BYTES_PER_BYTE} times its size; "
            "if the file is what it should be, raise GRANQ_READ_MEMORY_BYTES",
            reason="READ_MEMORY",
            field=field,
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        tell("")


def _data_bytes() -> int:
    """Return what RLIMIT_DATA counts of this process."""
    with open("/proc/self/statm") as file:
        # The sixth number is pages of data and stack, which the kernel compares with the limit.
        return int(file.read().split()[5]) * resource.getpagesize()


def death_while_reading(code: int, field: str, seconds: float) -> GranqError | None:
    """Return what a process's end says about the file that it was reading; None when it says nothing.

    Args:
        code: Exit code; a signal's number is negative.
        field: What it was reading; empty when nothing.
        seconds: The limit that it had.
    """
    if not field:
        return None
    if -code == signal.SIGALRM:
        return ResourceExhaustedError(
            f"reading {field} takes more than {seconds:g} s; if the file is what it should be, raise "
            "GRANQ_READ_SECONDS",
            reason="READ_TIME",
            field=field,
        )
    if -code in _CRASHES:
        return InvalidArgumentError(
            f"the file that {field} names ended the process that read it ({signal.Signals(-code).name}); it is "
            "damaged, made to do harm, or needs more memory than GRANQ_READ_MEMORY_BYTES allows",
            reason="READ_CRASHED",
            field=field,
        )
    return None
