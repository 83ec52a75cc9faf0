"""Servers that come back when they were killed, as under a service manager."""

import contextlib
import os
import signal
import threading
import time
from random import Random

import psutil

from tests.support.servers import ServerProcess
from tests.support.waiting import is_gone

_LOOK_SECONDS = 0.1


class Supervised:
    """Keeps one server running.

    Args:
        server: Not started yet.
        random: Chooses how long it stays away.
    """

    def __init__(self, server: ServerProcess, random: Random) -> None:
        self.server = server
        self.restarts = 0
        self.children_seen: set[int] = set()
        self._random = random
        self._ending = threading.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=server.name, daemon=True)

    def start(self) -> None:
        """Start the server and its watch."""
        self.server.start()
        self._up.set()
        self._thread.start()

    def _watch(self) -> None:
        while not self._ending.wait(_LOOK_SECONDS):
            if not is_gone(self.server.pid):
                continue
            self._up.clear()
            self.server.wait()
            if self._ending.wait(self._random.uniform(0, 1.5)):
                return
            with contextlib.suppress(AssertionError):  # not now, perhaps for want of its database: again later
                self.server.start()
                self.restarts += 1
                self._up.set()

    @property
    def pid(self) -> int | None:
        """Process id, or None while it is down."""
        return self.server.pid if self._up.is_set() and not is_gone(self.server.pid) else None

    def children(self) -> list[int]:
        """Process ids of what the server began, its jobs first of all."""
        pid = self.pid
        if pid is None:
            return []
        try:
            found = [child.pid for child in psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self.children_seen.update(found)
        return found

    def wait_up(self, seconds: float) -> None:
        """Return when the server serves."""
        assert self._up.wait(seconds), f"{self.server.name} did not come back:\n{self.server.log[-3000:]}"

    def stop(self) -> int:
        """Stop the watch and then the server, gracefully; return its exit code."""
        self.wait_up(120)
        self.children()
        self._ending.set()
        self._thread.join(120)
        return self.server.stop(60)

    def kill(self) -> None:
        """End all at once, whatever it does; for the way out of a run that failed."""
        self._ending.set()
        self._thread.join(120)
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(self.server.pid, signal.SIGCONT)
            self.server.kill()


def signal_process(pid: int, number: signal.Signals) -> bool:
    """Send a signal; return whether there was such a process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def pause_process(pid: int, seconds: float, ending: threading.Event) -> bool:
    """Stop a process for a while; return whether there was one."""
    if not signal_process(pid, signal.SIGSTOP):
        return False
    ending.wait(seconds)
    signal_process(pid, signal.SIGCONT)
    return True


def until(condition: object, seconds: float, what: str) -> None:
    """Poll until a callable returns something true."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(_LOOK_SECONDS)
