"""Starts the four services, keeps them running, and leaves no process behind."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from granq.local.health import is_serving
from granq.local.plan import SERVICES, Plan, Service

START_SECONDS = 180.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.05
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
# A service that ran this long before it died is restarted at once, as if it had never died before.
STEADY_SECONDS = 60.0
FAILED_STARTS = 5
LOG_TAIL_LINES = 20

Report = Callable[[str], None]


class StartError(Exception):
    """A service does not come up; the message has the end of its log."""


@dataclass
class Running:
    """What is known of one service while it runs."""

    service: Service
    bound: tuple[int, int]
    address: str = ""
    process: asyncio.subprocess.Process | None = None
    serving: asyncio.Event = field(default_factory=asyncio.Event)

    def describe(self) -> dict[str, object]:
        """Return what scripts want to know."""
        pid = self.process.pid if self.process else 0
        return {"address": self.address, "port": self.bound[0], "metrics_port": self.bound[1], "pid": pid}


class Supervisor:
    """Runs the services of one plan.

    Args:
        plan: Layout.
        report: Called with a sentence for each start, death and restart.
    """

    def __init__(self, plan: Plan, report: Report) -> None:
        self._plan, self._report = plan, report
        self._running = {service.name: Running(service, plan.ports(service)) for service in SERVICES}
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def describe(self) -> dict[str, dict[str, object]]:
        """Return address, ports and process id of each service by name."""
        return {name: running.describe() for name, running in self._running.items()}

    async def start(self) -> None:
        """Start everything and return when all four are SERVING.

        Raises:
            StartError: A service died or did not answer in time; what was started goes on until :meth:`stop`.
        """
        for service in SERVICES:
            self._plan.log_file(service).parent.mkdir(parents=True, exist_ok=True)
            self._plan.ready_file(service).parent.mkdir(parents=True, exist_ok=True)
        self._tasks = [asyncio.create_task(self._keep(running)) for running in self._running.values()]
        everything = asyncio.create_task(self._all_serving())
        events: list[asyncio.Future[Any]] = [everything, *self._tasks]
        done, _ = await asyncio.wait(events, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if everything not in done:
            everything.cancel()
            await asyncio.gather(everything, return_exceptions=True)
            for task in self._tasks:
                if task.done():
                    task.result()
            late = ", ".join(name for name, running in self._running.items() if not running.serving.is_set())
            raise StartError(f"no answer from {late} within {START_SECONDS:.0f} s; see {self._plan.data / 'logs'}")

    async def _all_serving(self) -> None:
        for running in self._running.values():
            await running.serving.wait()

    async def run(self) -> None:
        """Watch over the services until :meth:`stop`.

        Raises:
            StartError: A service died again and again without coming up.
        """
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def stop(self) -> None:
        """Stop the coordinator, then the workers, each gracefully and after :data:`STOP_SECONDS` by force."""
        self._stopping.set()
        for group in (("coordinator",), ("generator", "quantizer", "evaluator")):
            await asyncio.gather(*(self._end(self._running[name]) for name in group))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def kill(self) -> None:
        """End every process at once, without grace."""
        for running in self._running.values():
            if running.process is not None:
                _kill_group(running.process)

    async def _keep(self, running: Running) -> None:
        """Start a service whenever it does not run, until told to stop."""
        name, wait, failed, first = running.service.name, FIRST_WAIT, 0, True
        while not self._stopping.is_set():
            for need in running.service.needs:
                # Fixed ports are known before anything runs; chosen ones only when the service has bound them.
                if self._plan.port == 0:
                    await self._running[need].serving.wait()
            began = time.monotonic()
            process = await self._launch(running)
            ready = asyncio.create_task(self._await_serving(running))
            await process.wait()
            came_up = running.serving.is_set()
            ready.cancel()
            running.serving.clear()
            _kill_group(process)  # what it may have left: its job processes
            running.process = None  # the kernel may give its number to another process from now on
            if self._stopping.is_set():
                return
            text = f"{name} ended with {_describe_exit(process.returncode)}"
            failed = 0 if came_up else failed + 1
            if (first and not came_up) or failed >= FAILED_STARTS:
                raise StartError(f"{text}\n{_tail(self._plan.log_file(running.service))}")
            if time.monotonic() - began >= STEADY_SECONDS:
                wait = FIRST_WAIT
            self._report(f"{text}; restarting in {wait:.1f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait)
            wait, first = min(wait * 2, LONGEST_WAIT), False

    async def _launch(self, running: Running) -> asyncio.subprocess.Process:
        service = running.service
        self._plan.ready_file(service).unlink(missing_ok=True)
        addresses = {need: self._address(self._running[need]) for need in service.needs}
        environment = self._plan.environment(service, running.bound, addresses)
        launcher = str(Path(__file__).with_name("child.py"))
        command = [sys.executable, "-P", "-m", f"services.{service.name}"]
        with self._plan.log_file(service).open("ab") as log:
            # Own session: Ctrl-C on the terminal reaches the supervisor alone, which then stops them in order.
            running.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", launcher, str(os.getpid()), *command),
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return running.process

    async def _await_serving(self, running: Running) -> None:
        """Learn the bound ports from the service's ready file, then ask for its health until it is SERVING."""
        ready_file = self._plan.ready_file(running.service)
        while not ready_file.is_file():
            await asyncio.sleep(POLL_SECONDS)
        ports = json.loads(ready_file.read_text("utf-8"))
        running.bound = (int(ports["port"]), int(ports["metrics_port"]))
        running.address = self._address(running)
        while not await is_serving(running.address, timeout=2.0):
            await asyncio.sleep(POLL_SECONDS)
        running.serving.set()
        self._report(f"{running.service.name} serves at {running.address}")

    def _address(self, running: Running) -> str:
        host = "127.0.0.1" if self._plan.host in ("", "0.0.0.0", "::", "[::]") else self._plan.host  # noqa: S104
        return f"{host}:{running.bound[0]}"

    async def _end(self, running: Running) -> None:
        process = running.process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            _kill_group(process)
        await process.wait()


def _kill_group(process: asyncio.subprocess.Process) -> None:
    """Kill a service's process and all that it started and left in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _describe_exit(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text("utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"the end of {log}:", *(f"  {line}" for line in lines)])
    return f"it wrote no log to {log}"
