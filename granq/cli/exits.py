"""Exit codes, part of the command's interface: scripts may rely on them."""

from enum import IntEnum


class Exit(IntEnum):
    """What the granq command ends with."""

    OK = 0
    FAILED = 1
    """The pipeline failed, or a server had an internal error."""
    USAGE = 2
    """Wrong arguments, found here or by the server (INVALID_ARGUMENT)."""
    UNREACHABLE = 3
    """No server answered in time."""
    CANCELLED = 4
    """The pipeline was cancelled."""
    REFUSED = 5
    """Not found, or not possible in this state, or not allowed, or no room."""
    DATA = 6
    """A local file could not be read or written, or bytes came with another digest."""
    DETACHED = 130
    """Ctrl-C; the pipeline goes on."""


EPILOG = (
    "Exit codes: 0 done · 1 pipeline or server failed · 2 wrong arguments · 3 no server reached · 4 cancelled · "
    "5 not found or refused · 6 file or digest error · 130 left by Ctrl-C, the pipeline goes on"
)

BY_CODE = {
    "INVALID_ARGUMENT": Exit.USAGE,
    "OUT_OF_RANGE": Exit.USAGE,
    "UNAVAILABLE": Exit.UNREACHABLE,
    "DEADLINE_EXCEEDED": Exit.UNREACHABLE,
    "CANCELLED": Exit.CANCELLED,
    "NOT_FOUND": Exit.REFUSED,
    "ALREADY_EXISTS": Exit.REFUSED,
    "PERMISSION_DENIED": Exit.REFUSED,
    "UNAUTHENTICATED": Exit.REFUSED,
    "FAILED_PRECONDITION": Exit.REFUSED,
    "RESOURCE_EXHAUSTED": Exit.REFUSED,
    "ABORTED": Exit.REFUSED,
    "UNIMPLEMENTED": Exit.REFUSED,
    "DATA_LOSS": Exit.DATA,
}


def exit_for(status: str) -> Exit:
    """Return the exit code for the name of a gRPC status code."""
    return BY_CODE.get(status, Exit.FAILED)
