"""Pipelines a minute against the number of workers, whose jobs do nothing but take their time.

A simulated worker is generator, quantizer and evaluator in one, takes one job at a time, and has the real machinery of
jobs: a process for each, checkpoints, progress, events. So what is measured is how well a coordinator keeps workers
busy, and what a pipeline costs beside its computation.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks.load.coordinator_process import NAME, addresses
from granq.v1 import coordinator_pb2
from services.coordinator.transitions import State
from tests.support.coordinator import Client, WorkerProcess
from tests.support.pipelines import sqlite_url
from tests.support.scripted_jobs import Script
from tests.support.servers import ServerProcess

COLUMNS = (
    "workers",
    "pipelines",
    "seconds",
    "pipelines/min",
    "times one worker",
    "workers computing",
    "CPU s a pipeline",
    "of which the coordinator",
)
_STEPS = 5  # of a scripted job
_SHARES = {"inspect": 0.05, "synthesize": 0.2, "quantize": 0.6, "export": 0.05, "evaluate": 0.1}
"""Of a pipeline's computation, by jobs."""


class _Coordinator(ServerProcess):
    """The coordinator, with a name for all workers."""

    def __init__(self, folder: Path, workers: int, port: int) -> None:
        roles = ("generator", "quantizer", "evaluator")
        host = NAME if workers > 1 else addresses(1)[0]  # a name of one address is left for gRPC to look up
        reached = {f"{role}_address": f"{host}:{port}" for role in roles}
        super().__init__("coordinator", folder, database_url=sqlite_url(folder), **reached)
        self._workers = workers

    @property
    def module(self) -> str:
        """What is run."""
        return "benchmarks.load.coordinator_process"

    def environment(self) -> dict[str, str]:
        """Environment of the process."""
        return {**super().environment(), "WORKERS": str(self._workers)}


def _started(workers: int, folder: Path, stack: ExitStack) -> tuple[ServerProcess, list[ServerProcess]]:
    """Start workers, all at one port of an address each, and a coordinator; all end with ``stack``."""
    servers: list[ServerProcess] = []
    for number, host in enumerate(addresses(workers)):
        worker = WorkerProcess(folder, f"worker{number}", host=host, max_running_jobs="1")
        worker.port = servers[0].port if servers else 0
        servers.append(worker.start())
        stack.callback(worker.stop)
    coordinator = _Coordinator(folder, workers, servers[0].port).start()
    stack.callback(coordinator.stop)
    return coordinator, servers


def _cpu_seconds(server: ServerProcess) -> float:
    """Return what a server and the jobs that it has waited for have used."""
    return sum(psutil.Process(server.pid).cpu_times()[:4])


async def _succeed(client: Client, pipeline_id: str) -> None:
    request = coordinator_pb2.WatchPipelineRequest(pipeline_id=pipeline_id)
    state = State.PIPELINE_STATE_UNSPECIFIED
    async for event in client.pipelines.WatchPipeline(request):
        state = event.state
    if state != State.PIPELINE_STATE_SUCCEEDED:
        raise RuntimeError(f"{pipeline_id} ended as {State.Name(state)}")


async def _drain(address: str, pipelines: int) -> float:
    """Run pipelines, all submitted at once, and return the seconds until the last has succeeded."""
    client = Client(address)
    try:
        began = time.perf_counter()
        made = [await client.submit() for _ in range(pipelines)]
        await asyncio.gather(*(_succeed(client, pipeline.pipeline_id) for pipeline in made))
        return time.perf_counter() - began
    finally:
        await client.close()


def measure(
    workers: list[int], pipelines: int, computation: float, add: Callable[..., None], patience: float = 600.0
) -> None:
    """Give a row for each number of workers to ``add``.

    Args:
        workers: Numbers of workers; times are relative to those of the first row.
        pipelines: For each worker.
        computation: Seconds of a pipeline's computation, all jobs together.
        add: Takes the cells of a row.
        patience: Seconds after which a run counts as stuck.
    """
    first = 0.0
    for count in workers:
        with TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            script = Script(folder / "script")
            for kind, share in _SHARES.items():
                script.tell(kind, step_seconds=computation * share / _STEPS)
            coordinator, servers = _started(count, folder, stack)
            before = [_cpu_seconds(server) for server in (coordinator, *servers)]
            total = count * pipelines
            seconds = asyncio.run(asyncio.wait_for(_drain(coordinator.address, total), patience))
            used = [_cpu_seconds(server) - b for server, b in zip((coordinator, *servers), before, strict=True)]
            computed = sum(computation * share * len(script.lines(kind, "ends")) for kind, share in _SHARES.items())
            rate = 60 * total / seconds
            first = first or rate
            add(
                count,
                total,
                f"{seconds:.1f}",
                f"{rate:.1f}",
                f"{rate / first:.2f}",
                f"{100 * computed / (seconds * count):.0f} %",
                f"{sum(used) / total:.2f}",
                f"{used[0] / total:.2f}",
            )
