"""A coordinator under load: many pipelines queued, many watchers, many clients that submit.

No worker runs: the pipelines that are driven wait for one, and all others are queued. So what is measured is the
coordinator and its database.
"""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import psutil

import granq
from granq.v1 import coordinator_pb2, coordinator_pb2_grpc
from tests.support.postgres import postgres_server
from tests.support.servers import ServerProcess

_NOBODY = "127.0.0.1:1"
_TIMEOUT = 120.0


@contextmanager
def coordinator(database: str) -> Iterator[ServerProcess]:
    """Run a coordinator on "sqlite" or "postgresql"."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        addresses = {f"{worker}_address": _NOBODY for worker in ("generator", "quantizer", "evaluator")}
        if database == "sqlite":
            server = ServerProcess("coordinator", folder, database_url=f"sqlite:///{name}/db.sqlite", **addresses)
            try:
                yield server.start()
            finally:
                server.stop()
            return
        with postgres_server() as postgres:
            server = ServerProcess("coordinator", folder, database_url=postgres.url, **addresses)
            try:
                yield server.start()
            finally:
                server.stop()


class Load:
    """Clients of one coordinator.

    Args:
        address: The coordinator's.
        clients: Connections that submit.
        spec: What they submit.
    """

    def __init__(self, address: str, clients: int, spec: coordinator_pb2.PipelineSpec) -> None:
        option = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(address, option) for _ in range(clients)]
        self._stubs: list[Any] = [coordinator_pb2_grpc.PipelineServiceStub(channel) for channel in self._channels]
        self._spec = spec
        self._watches: list[asyncio.Task[None]] = []
        self.made: dict[str, str] = {}
        self.seen: Counter[str] = Counter()
        self.doubled: list[str] = []

    async def submit(self, count: int, pause: float, phase: str) -> tuple[list[float], float]:
        """Submit, each client as soon as it has its answer and has paused.

        Every tenth request is sent twice, as a client does that lost the answer.

        Returns:
            Seconds of each call, and of all together.
        """
        seconds: list[float] = []
        slug = phase.replace(" ", "-")

        async def client(number: int) -> None:
            await asyncio.sleep(random.uniform(0, pause))  # noqa: S311 - spreads load
            for turn in range(count // len(self._stubs)):
                request_id = f"{slug}-{number}-{turn}"
                request = coordinator_pb2.SubmitPipelineRequest(spec=self._spec, request_id=request_id)
                for _ in range(2 if turn % 10 == 9 else 1):
                    began = time.perf_counter()
                    answer = await self._stubs[number].SubmitPipeline(request, timeout=_TIMEOUT)
                    seconds.append(time.perf_counter() - began)
                    if self.made.setdefault(request_id, answer.pipeline.pipeline_id) != answer.pipeline.pipeline_id:
                        self.doubled.append(request_id)
                await asyncio.sleep(pause)

        began = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(len(self._stubs))))
        return seconds, time.perf_counter() - began

    async def watch(self, count: int) -> None:
        """Watch that many pipelines until `close`, and return when each watcher has had an event."""

        async def watcher(number: int, pipeline_id: str) -> None:
            request = coordinator_pb2.WatchPipelineRequest(pipeline_id=pipeline_id)
            async for event in self._stubs[number % len(self._stubs)].WatchPipeline(request):
                if event.sequence != self.seen[pipeline_id] + 1:
                    self.doubled.append(f"event {event.sequence} of {pipeline_id}")
                self.seen[pipeline_id] = event.sequence

        watched = list(self.made.values())[:count]
        self._watches = [asyncio.create_task(watcher(*pair)) for pair in enumerate(watched)]
        while len(self.seen) < len(watched):
            await asyncio.sleep(0.05)

    async def stored(self) -> list[str]:
        """Return the ids of all pipelines, as listed."""
        found: list[str] = []
        token = ""
        while True:
            request = coordinator_pb2.ListPipelinesRequest(page_size=1000, page_token=token)
            page = await self._stubs[0].ListPipelines(request, timeout=_TIMEOUT)
            found += [pipeline.pipeline_id for pipeline in page.pipelines]
            token = page.next_page_token
            if not token:
                return found

    async def close(self) -> None:
        """End watches and connections."""
        for task in self._watches:
            task.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for channel in self._channels:
            await channel.close(None)


async def _run(
    server: ServerProcess, queued: int, watchers: int, clients: int, submits: int, add: Callable[..., None]
) -> None:
    process = psutil.Process(server.pid)
    with granq.Client(server.address) as client:
        spec = granq.pipeline_spec(granq.model_source(client.upload(b"model", name="model.pt2")))
    load = Load(server.address, clients, spec)
    try:
        begun = process.memory_info().rss
        phases = (("filling the queue", queued, 0.0), ("1 a second each", submits, 1.0), ("no pause", submits, 0.0))
        for phase, count, pause in phases:
            cpu = sum(process.cpu_times()[:2])
            seconds, wall = await load.submit(count, pause, phase)
            cpu = sum(process.cpu_times()[:2]) - cpu
            if phase == phases[0][0]:
                await load.watch(watchers)
            stored = await load.stored()
            add(
                "" if phase != phases[0][0] else "before watchers come",
                phase,
                len(seconds),
                f"{1e3 * statistics.median(seconds):.1f}",
                f"{1e3 * statistics.quantiles(seconds, n=100)[98]:.1f}",
                f"{1e3 * max(seconds):.1f}",
                f"{len(seconds) / wall:.0f}",
                f"{1e3 * cpu / len(seconds):.1f}",
                len(set(load.made.values()) - set(stored)),
                len(stored) - len(set(load.made.values())) + len(load.doubled),
                f"{(process.memory_info().rss - begun) / 1e6:.0f}",
            )
    finally:
        await load.close()


def measure(database: str, queued: int, watchers: int, clients: int, submits: int, add: Callable[..., None]) -> None:
    """Give the rows of one database to ``add``."""
    with coordinator(database) as server:
        first = f"{database}, {watchers} watchers"
        asyncio.run(
            _run(
                server,
                queued,
                watchers,
                clients,
                submits,
                lambda what, *cells: add(f"{database}, {what}" if what else first, *cells),
            )
        )


COLUMNS = (
    "database",
    "clients",
    "calls",
    "median ms",
    "p99 ms",
    "most ms",
    "calls/s",
    "CPU ms of the coordinator, a call",
    "lost",
    "doubled",
    "memory growth, MB",
)
