"""How long commands and servers take to start, and what idle servers use.

Wall time counts what else the machine does; CPU time does not, and on free cores wall time comes down to it.
"""

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests.support.servers import ServerProcess

_START_SECONDS = 180.0
Sample = tuple[float, float]


def command(*arguments: str) -> Sample:
    """Return wall and CPU seconds of a Python process that runs to its end."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def server(name: str) -> Sample:
    """Return wall and CPU seconds from a server's start, on an empty folder, until it serves."""
    with TemporaryDirectory() as folder:
        settings = {"database_url": f"sqlite:///{folder}/coordinator.sqlite"} if name == "coordinator" else {}
        began = time.perf_counter()
        process = ServerProcess(name, Path(folder), **settings).start()
        try:
            return time.perf_counter() - began, cpu_seconds(process.pid)
        finally:
            process.stop()


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process and those below it have used."""
    parent = psutil.Process(pid)
    return float(sum(sum(process.cpu_times()[:2]) for process in (parent, *parent.children(recursive=True))))


def everything(idle_seconds: float) -> tuple[Sample, dict[str, float]]:
    """Start `granq up`.

    Returns:
        Wall and CPU seconds until all four serve, then the share of a core that each uses while nothing is asked of it.
    """
    with TemporaryDirectory() as folder:
        ready = Path(folder, "ready.json")
        arguments = ["-m", "granq.cli", "up", "--data", folder, "--port", "0", "--ready-file", str(ready)]
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
        try:
            while not ready.is_file() or not ready.read_text("utf-8"):
                if process.poll() is not None or time.perf_counter() - began > _START_SECONDS:
                    raise RuntimeError("granq up does not come up")
                time.sleep(0.01)
            sample = time.perf_counter() - began, cpu_seconds(process.pid)
            found = json.loads(ready.read_text("utf-8"))["services"]
            return sample, _idle({name: int(about["pid"]) for name, about in found.items()}, idle_seconds)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _idle(pids: dict[str, int], seconds: float) -> dict[str, float]:
    time.sleep(5.0)  # what follows a start, such as the first sweep, is not idleness
    before, began = {name: cpu_seconds(pid) for name, pid in pids.items()}, time.perf_counter()
    time.sleep(seconds)
    wall = time.perf_counter() - began
    return {name: (cpu_seconds(pid) - before[name]) / wall for name, pid in pids.items()}


def measure(repeats: int, idle_seconds: float, add: Callable[..., None]) -> None:
    """Give the table's rows to ``add``, one by one."""

    def row(what: str, goal: str, samples: list[Sample]) -> None:
        walls, cpus = zip(*samples, strict=True)
        add(what, goal, f"{statistics.median(walls):.2f}", f"{min(walls):.2f}", f"{min(cpus):.2f}")

    row("python -c pass (floor)", "", [command("-c", "pass") for _ in range(repeats)])
    row("import granq", "0.2 s", [command("-c", "import granq") for _ in range(repeats)])
    row("import granq; granq.Client", "", [command("-c", "import granq; granq.Client") for _ in range(repeats)])
    row("granq --help", "0.3 s", [command("-m", "granq.cli", "--help") for _ in range(repeats)])
    for name in ("coordinator", "evaluator", "generator", "quantizer"):
        goal = "3 s" if name in ("coordinator", "evaluator") else ""
        row(f"{name} serves", goal, [server(name) for _ in range(repeats)])
    first, shares = everything(idle_seconds)
    samples = [first, *(everything(0.0)[0] for _ in range(repeats // 2))]
    row(f"granq up, all four serve, {len(os.sched_getaffinity(0))} cores", "10 s", samples)
    for name, share in shares.items():
        add(f"{name}, idle for {idle_seconds:.0f} s", "1 % of a core", "", "", f"{100 * share:.2f} %")


COLUMNS = ("what", "goal", "wall s, median", "wall s, least", "CPU s, least")
