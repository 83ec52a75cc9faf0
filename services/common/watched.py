"""Values read from files, read again when the files change: certificates, tokens, principals."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from services.common.errors import GranqError
from services.common.logs import get_logger

_T = TypeVar("_T")
_State = tuple[tuple[int, ...] | None, ...]
_log = get_logger("services.common.watched")


def _state(paths: Sequence[Path]) -> _State:
    found: list[tuple[int, ...] | None] = []
    for path in paths:
        try:
            # Follows links: Kubernetes changes a mounted secret by pointing a link elsewhere.
            stat = os.stat(path)
            found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)


class Watched(Generic[_T]):
    """A value that follows its files. Used from any thread; looking for a change costs a system call for each file.

    A change that cannot be read is logged once, and the value of before stays: half-written files end no server.

    Args:
        paths: The files.
        load: Reads the value; raises GranqError when the files do not hold one.

    Raises:
        GranqError: What `load` raised at the first time.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[], _T]) -> None:
        self._paths = tuple(paths)
        self._load = load
        self._lock = threading.Lock()
        # Before it is read: a change while it is read is then seen as one.
        self._seen = _state(self._paths)
        self._value = load()

    def get(self) -> _T:
        """Return the value that the files hold now, or the last one that could be read."""
        state = _state(self._paths)
        if state != self._seen:
            with self._lock:
                if state != self._seen:
                    self._seen = state
                    self._reload()
        return self._value

    def _reload(self) -> None:
        files = [str(path) for path in self._paths]
        try:
            self._value = self._load()
        except GranqError as error:
            _log.error("changed files not taken over", files=files, error=error.message)
        else:
            _log.info("changed files taken over", files=files)
