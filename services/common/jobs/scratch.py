"""Folders for temporary files of jobs, and the end of those whose server was killed.

A server holds a lock on each folder that it uses. The system lets go of it in the moment the server dies, however it
dies, so a folder whose lock is free belongs to nobody, whatever container or process id its server had.
"""

import fcntl
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from services.common.logs import get_logger

_PREFIX = "granq-job-"
log = get_logger(__name__)


class Scratch:
    """A folder for one job's temporary files, in the system's folder for these.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        # Under another name until it is locked, so that a server that starts now takes it for nobody's.
        fresh = root / f".{_PREFIX}{uuid.uuid4().hex}"
        fresh.mkdir(mode=0o700)
        self._lock = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = fresh.rename(root / fresh.name.removeprefix("."))

    def remove(self) -> None:
        """Remove the folder; what cannot be removed now is left to the next start of a server. May be repeated."""
        shutil.rmtree(self.path, ignore_errors=True)
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def remove_abandoned() -> None:
    """Remove the folders of servers that were killed; those in use, and those of other accounts, stay."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # gone by now, another account's, or no folder
        try:
            if os.fstat(descriptor).st_uid != os.geteuid():
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
            log.info("removed temporary files of a server that was killed", folder=path.name)
        finally:
            os.close(descriptor)
