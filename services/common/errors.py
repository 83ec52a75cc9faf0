"""Errors of the domain: what a service raises, what a failed job carries and what a caller of a service catches.

Each class stands for one status of google.rpc.Code. The table below is the only place that joins the two, so the
classes know nothing of the transport, and every way out (an RPC's status, a job's stored failure) says the same.
"""

import errno
import os
import re
from collections.abc import Callable
from functools import cache

from granq.v1 import common_pb2

WORKER_BUSY = "WORKER_BUSY"
"""Reason of a worker that takes no job now: another one may, or the same one later."""

INTERNAL_MESSAGE = "internal error; the server's log has the details"
_PATH = re.compile(r"(?<![\w/.:…])/([\w.@+-]+)/(?:[\w.@+-]+/)*([\w.@+-]*)")


class GranqError(Exception):
    """Base of all errors that may be shown to a user.

    Args:
        message: A sentence for people: what was wrong, with the received value, and what to do.
        reason: Stable UPPER_SNAKE_CASE identifier for programs. Default: that of the class.
        field: Path of the request field at fault, such as "model.artifact.digest". Empty when none was.
    """

    reason: str = "INTERNAL"

    def __init__(self, message: str, *, reason: str | None = None, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.field = field

    def __reduce__(self) -> tuple[Callable[..., "GranqError"], tuple[type["GranqError"], str, str, str]]:
        # Without this, pickle would call the class with the message alone and lose reason and field.
        return _rebuild, (type(self), self.message, self.reason, self.field)


def _rebuild(cls: type[GranqError], message: str, reason: str, field: str) -> GranqError:
    return cls(message, reason=reason, field=field)


class InvalidArgumentError(GranqError):
    """A request or a file is wrong in itself; the same call never succeeds."""

    reason = "INVALID_ARGUMENT"


class NotFoundError(GranqError):
    """The named thing does not exist."""

    reason = "NOT_FOUND"


class DeadlineExceededError(GranqError):
    """The time that was given for the work is over."""

    reason = "DEADLINE_EXCEEDED"


class AlreadyExistsError(GranqError):
    """The chosen name belongs to something else."""

    reason = "ALREADY_EXISTS"


class UnauthenticatedError(GranqError):
    """Who calls is not known: credentials are missing, unknown or expired."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(GranqError):
    """Who calls is known, and may not make this call."""

    reason = "PERMISSION_DENIED"


class FailedPreconditionError(GranqError):
    """The system must be changed first, such as by installing a package."""

    reason = "FAILED_PRECONDITION"


class ResourceExhaustedError(GranqError):
    """Memory, disk, or a configured maximum is used up."""

    reason = "RESOURCE_EXHAUSTED"


class UnavailableError(GranqError):
    """A process, a service or a store cannot be reached now; trying again may succeed."""

    reason = "UNAVAILABLE"


class DataLossError(GranqError):
    """Stored bytes are damaged or incomplete."""

    reason = "DATA_LOSS"


class AbortedError(GranqError):
    """The call met a concurrent one; the caller may begin again."""

    reason = "ABORTED"


class CancelledError(GranqError):
    """The work was ended on request."""

    reason = "CANCELLED"


class InternalError(GranqError):
    """A defect of this software."""

    reason = "INTERNAL"


CODES: dict[type[GranqError], int] = {
    CancelledError: 1,
    InvalidArgumentError: 3,
    DeadlineExceededError: 4,
    NotFoundError: 5,
    AlreadyExistsError: 6,
    PermissionDeniedError: 7,
    ResourceExhaustedError: 8,
    FailedPreconditionError: 9,
    AbortedError: 10,
    InternalError: 13,
    UnavailableError: 14,
    DataLossError: 15,
    UnauthenticatedError: 16,
}
"""Number in google.rpc.Code of each class; a subclass that is not listed has its base's."""

CLASSES: dict[int, type[GranqError]] = {
    **{code: cls for cls, code in CODES.items()},
    11: InvalidArgumentError,  # OUT_OF_RANGE
}
"""Class for each number in google.rpc.Code; a number that is not listed means InternalError."""


def code_of(error: GranqError) -> int:
    """Return the google.rpc.Code number of an error."""
    for cls in type(error).__mro__:
        if cls in CODES:
            return CODES[cls]
    return CODES[InternalError]


_TORCH_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
# How native code tells of an allocation that failed, where it has no exception of its own for it.
_NO_MEMORY = (_TORCH_NO_MEMORY, "bad_alloc", "bad allocation", "Failed to allocate memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, or one that led to it, tells of host memory that could not be had."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return True
        if not isinstance(cause, GranqError) and any(words in str(cause) for words in _NO_MEMORY):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def as_granq_error(error: BaseException) -> GranqError | None:
    """Return the domain error that an exception stands for, or None when it is a defect.

    Exhausted memory (host or CUDA) and full disks are states of the machine, not defects, wherever they are raised.
    """
    if isinstance(error, GranqError):
        return error
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _TORCH_NO_MEMORY in str(error)):
        return ResourceExhaustedError("the host's memory is used up; use a smaller batch", reason="OUT_OF_MEMORY")
    if any(cls.__name__ == "OutOfMemoryError" and cls.__module__.startswith("torch") for cls in type(error).__mro__):
        # By name, because importing torch here would load it into services that must run without it.
        return ResourceExhaustedError("the GPU's memory is used up; use a smaller batch", reason="OUT_OF_GPU_MEMORY")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhaustedError("the disk is full; free space and try again", reason="DISK_FULL")
    return None


@cache
def _top_folders() -> frozenset[str]:
    return frozenset(os.listdir("/"))


def without_paths(message: str) -> str:
    """Return a message in which a file of this machine is called by its name alone: "…/weights.pt".

    Messages say what a library said, and libraries say where files are. Only what begins with a folder of this machine
    is taken for a path: names of layers have slashes, too.
    """
    plain = message.replace("file://", "")
    return _PATH.sub(lambda found: f"…/{found[2]}" if found[1] in _top_folders() else found[0], plain)


def to_failure(error: BaseException) -> common_pb2.Failure:
    """Return what a user may know of an exception; a defect gets a fixed message, for its text belongs in the log."""
    known = as_granq_error(error)
    if known is None:
        return common_pb2.Failure(code=CODES[InternalError], reason=InternalError.reason, message=INTERNAL_MESSAGE)
    message = without_paths(known.message)
    return common_pb2.Failure(code=code_of(known), reason=known.reason, message=message, field=known.field)


def from_failure(failure: common_pb2.Failure) -> GranqError:
    """Return the error that a failure was made from; the inverse of `to_failure` for listed classes."""
    return CLASSES.get(failure.code, InternalError)(failure.message, reason=failure.reason or None, field=failure.field)
