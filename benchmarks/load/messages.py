"""What the messages of joint training cost by themselves: a generator server whose generator computes nothing.

The floor is gRPC alone: the same bytes there and back between two processes, neither parsed nor passed on.
"""

import asyncio
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import psutil
import torch

from benchmarks.load.joint import Case
from granq.v1 import artifacts_pb2, common_pb2, jobs_pb2
from services.common.security import SecuritySettings
from services.quantizer.generator_client import CoTrainSource, opening
from tests.support.servers import ServerProcess

_METHOD = "/granq.benchmark/Echo"
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_WARM_UP = 10
_CLASSES = 1000


class _EchoServer(ServerProcess):
    @property
    def module(self) -> str:
        return "benchmarks.load.echo_process"


def _cpu(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _timed(
    turn: Callable[[int], object], processes: list[psutil.Process], iterations: int
) -> tuple[list[float], float]:
    """Return the seconds of each turn behind the warm-up, and the CPU seconds of one."""
    walls, before = [], 0.0
    for iteration in range(_WARM_UP + iterations):
        if iteration == _WARM_UP:
            before = _cpu(processes)
        began = time.perf_counter()
        turn(iteration)
        if iteration >= _WARM_UP:
            walls.append(time.perf_counter() - began)
    return walls, (_cpu(processes) - before) / iterations


def through_the_service(case: Case, iterations: int) -> tuple[list[float], float]:
    """Measure batches and gradients between a CoTrainSource and the process of its stream."""
    with TemporaryDirectory() as folder:
        server = _EchoServer("generator", Path(folder)).start()
        try:
            model = common_pb2.ModelSource(
                artifact=artifacts_pb2.Artifact(digest="sha256:" + "0" * 64),
                architecture=case.network,
                input_shape=(3, case.side, case.side),
            )
            key = jobs_pb2.JobKey(job_id="benchmark", pipeline_id="benchmark")
            message = opening(model, common_pb2.GeneratorConfig(), case.batch, 0, key)
            images, logits = torch.randn(case.batch, 3, case.side, case.side), torch.randn(case.batch, _CLASSES)
            with closing(CoTrainSource(server.address, SecuritySettings(), message, torch.device("cpu"))) as source:
                source.next(0)

                def turn(iteration: int) -> None:
                    source.answer(iteration, images, logits)
                    source.next(iteration + 1)

                processes = [psutil.Process(), psutil.Process(server.pid), *server.children()]
                return _timed(turn, processes, iterations)
        finally:
            server.stop()


def bare_grpc(case: Case, iterations: int) -> tuple[list[float], float]:
    """Measure the same bytes through one gRPC stream to another process and back."""
    content = bytes(4 * 3 * case.side**2 * case.batch)
    with subprocess.Popen([sys.executable, "-m", __spec__.name], stdout=subprocess.PIPE) as server:  # noqa: S603
        try:
            port = int(server.stdout.readline()) if server.stdout is not None else 0
            with grpc.insecure_channel(f"127.0.0.1:{port}", _UNLIMITED) as channel:
                requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
                untyped: Any = channel  # the stubs want serializers; without them, messages are bytes
                call = untyped.stream_stream(_METHOD)(iter(requests.get, None))

                def turn(_iteration: int) -> None:
                    requests.put(content)
                    next(call)

                measured = _timed(turn, [psutil.Process(), psutil.Process(server.pid)], iterations)
                requests.put(None)
                return measured
        finally:
            server.terminate()


def measure(case: Case, iterations: int, rounds: int) -> list[str]:
    """Return a row of the table."""
    ways: tuple[tuple[list[float], list[float]], ...] = (([], []), ([], []))
    for _ in range(rounds):
        for (walls, cpus), way in zip(ways, (bare_grpc, through_the_service), strict=True):
            wall, cpu = way(case, iterations)
            walls += wall
            cpus.append(cpu)
    megabytes = 2 * 4 * 3 * case.side**2 * case.batch / 1e6
    cells = [f"{case.side} px, batch {case.batch}", f"{megabytes:.2f}"]
    for walls, _ in ways:
        cells.append(f"{1e3 * statistics.median(walls):.1f} ({1e3 * min(walls):.1f})")
    least = [min(cpus) for _, cpus in ways]
    return [*cells, *(f"{1e3 * value:.1f}" for value in least), f"{least[1] / least[0]:.1f}"]


COLUMNS = (
    "images",
    "MB, both ways",
    "bare gRPC, ms",
    "service, ms",
    "CPU ms, bare gRPC",
    "CPU ms, service",
    "ratio of CPU",
)


async def _serve() -> None:
    async def echo(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    server = grpc.aio.server(options=_UNLIMITED)
    handler = grpc.stream_stream_rpc_method_handler(echo)
    service, _, method = _METHOD[1:].partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
