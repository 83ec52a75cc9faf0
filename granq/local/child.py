"""Becomes a service that cannot outlive the process that started it.

Run as a script, with the parent's process id and the command: it asks the kernel for SIGTERM at the parent's death and
replaces itself by the command. (A hook between fork and exec would run Python in a copy of a threaded process.)
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent, then run the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - the command comes from the supervisor, and no shell is wanted


if __name__ == "__main__":
    main()
