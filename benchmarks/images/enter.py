"""Becomes a process of a container: `python enter.py ROOT UID:GID FOLDER NAME=VALUE… -- COMMAND…`.

Called within the container's namespaces. Nothing is kept of this machine's environment, files, groups or rights.
"""

import ctypes
import os
import sys

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _LAST_CAPABILITY = 24, 38, 40


def _prctl(option: int, argument: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option} {argument}")


def main(arguments: list[str]) -> None:
    """Enter, drop all rights and execute the command."""
    split = arguments.index("--")
    root, user, folder = arguments[:3]
    environment = dict(pair.split("=", 1) for pair in arguments[3:split])
    command = arguments[split + 1 :]
    uid, gid = (int(part) for part in user.split(":"))
    os.chroot(root)
    os.chdir(folder)
    for capability in range(_LAST_CAPABILITY + 1):
        _prctl(_PR_CAPBSET_DROP, capability)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    os.umask(0o022)
    # Not os.execvpe: it imports a module, which after chroot is no longer there.
    for place in environment["PATH"].split(":"):
        if os.access(path := f"{place}/{command[0]}", os.X_OK):
            os.execve(path, command, environment)  # noqa: S606 - this is the purpose of the program
    sys.exit(f"{command[0]} is not on the image's PATH")


if __name__ == "__main__":
    main(sys.argv[1:])
