"""Breaks things at random moments, in an order that a seed decides."""

import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from tests.support.chaos.supervised import Supervised, pause_process, signal_process
from tests.support.postgres import PostgresServer
from tests.support.proxy import Proxy

Fault = Callable[[], bool]
_MIB = 1024 * 1024


class Monkey:
    """Injects one fault after the other, in a thread.

    Args:
        random: Chooses all of it.
        servers: Servers to kill, stop and freeze, and so their children.
        proxies: Connections to break.
        postgres: Database to restart; None for none.
        disk: Folder of a small file system to fill; None for none.
        pause_seconds: Range of the time between the end of a fault and the next one.
        outage_seconds: Range of the time that a fault lasts, where it has one.

    Attributes:
        servers: As given.
        injected: How often each kind of fault took place.
    """

    def __init__(
        self,
        *,
        random: Random,
        servers: Sequence[Supervised],
        proxies: Sequence[Proxy],
        postgres: PostgresServer | None,
        disk: Path | None,
        pause_seconds: tuple[float, float] = (0.2, 2.0),
        outage_seconds: tuple[float, float] = (0.3, 4.0),
    ) -> None:
        self.injected: Counter[str] = Counter()
        self.error: BaseException | None = None
        self._random = random
        self.servers = servers
        self._proxies = proxies
        self._postgres = postgres
        self._disk = disk
        self._pause = pause_seconds
        self._outage = outage_seconds
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monkey", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Heal what is broken, and end; raises what went wrong with the monkey itself."""
        self._ending.set()
        self._thread.join(180)
        assert not self._thread.is_alive(), "the monkey does not end"
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        faults: dict[str, Fault] = {
            "SIGKILL of a server": lambda: self._signal(signal.SIGKILL),
            "SIGTERM of a server": lambda: self._signal(signal.SIGTERM),
            "SIGSTOP of a server": lambda: self._freeze(self._server_pid()),
            "SIGKILL of a job": lambda: self._signal_child(signal.SIGKILL),
            "SIGTERM of a job": lambda: self._signal_child(signal.SIGTERM),
            "SIGSTOP of a job": lambda: self._freeze(self._child_pid()),
            "dropped connections": self._drop,
            "delayed connections": self._delay,
            "refused connections": self._refuse,
        }
        if self._postgres is not None:
            faults["restart of PostgreSQL"] = self._restart_postgres
        if self._disk is not None:
            faults["full file system"] = self._fill
        try:
            waiting: list[str] = []
            while not self._ending.wait(self._random.uniform(*self._pause)):
                # Each kind once in every round, so that a short run has all of them.
                if not waiting:
                    waiting = self._random.sample(sorted(faults), len(faults))
                name = waiting.pop()
                if faults[name]():
                    self.injected[name] += 1
        except BaseException as error:  # told by `stop`
            self.error = error

    def _seconds(self) -> float:
        return self._random.uniform(*self._outage)

    def _server_pid(self) -> int | None:
        return self._random.choice(self.servers).pid

    def _child_pid(self) -> int | None:
        """Return a job's process, waiting a little for one to be there."""
        for _ in range(20):
            children = [pid for server in self.servers for pid in server.children()]
            if children:
                return self._random.choice(sorted(children))
            if self._ending.wait(0.1):
                break
        return None

    def _signal(self, number: signal.Signals) -> bool:
        pid = self._server_pid()
        return pid is not None and signal_process(pid, number)

    def _signal_child(self, number: signal.Signals) -> bool:
        pid = self._child_pid()
        return pid is not None and signal_process(pid, number)

    def _freeze(self, pid: int | None) -> bool:
        return pid is not None and pause_process(pid, self._seconds(), self._ending)

    def _drop(self) -> bool:
        self._random.choice(self._proxies).drop()
        return True

    def _delay(self) -> bool:
        proxy = self._random.choice(self._proxies)
        proxy.delay(self._random.uniform(0.1, 1.0))
        self._ending.wait(self._seconds())
        proxy.delay(0)
        return True

    def _refuse(self) -> bool:
        proxy = self._random.choice(self._proxies)
        proxy.refuse(True)
        self._ending.wait(self._seconds())
        proxy.refuse(False)
        return True

    def _restart_postgres(self) -> bool:
        assert self._postgres is not None
        self._postgres.stop()
        self._ending.wait(self._seconds() / 2)
        self._postgres.start()
        return True

    def _fill(self) -> bool:
        assert self._disk is not None
        filler = self._disk / "filler"
        try:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(os.urandom(_MIB))
            self._ending.wait(
                self._seconds() / 4
            )  # short: each job that writes meanwhile fails, which ends its pipeline
        finally:
            filler.unlink()
        return True
