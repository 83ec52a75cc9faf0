"""A coordinator with a pool of devices: evaluators in processes of their own, whose builds are scripted."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from granq.v1 import coordinator_pb2, devices_pb2, devices_pb2_grpc
from services.coordinator.requests import Stage
from services.coordinator.tables import PipelineRow
from tests.support.coordinator import Bench, bench
from tests.support.pipelines import Database, results, spec
from tests.support.scripted_device import DeviceProcess, DeviceScript

State = devices_pb2.DeviceState
PATIENCE = 100.0


class Pool:
    """A coordinator with devices."""

    def __init__(self, made: Bench, folder: Path) -> None:
        self.bench = made
        self.script = DeviceScript(folder / "script")
        self._folder = folder
        self._devices: list[DeviceProcess] = []

    @property
    def port(self) -> int:
        """Port of the coordinator."""
        assert self.bench.coordinator is not None
        return self.bench.coordinator.port

    @property
    def address(self) -> str:
        """host:port of the coordinator."""
        return f"127.0.0.1:{self.port}"

    def device(self, name: str, coordinator: str = "", **settings: str) -> DeviceProcess:
        """Return a device that shares the store; not started yet."""
        chosen = {"artifact_url": self.bench.store.url, **settings}
        made = DeviceProcess(name, self._folder, coordinator or self.address, **chosen)
        self._devices.append(made)
        return made

    async def start(self, *devices: DeviceProcess) -> None:
        """Start devices at once, and return when all are in the pool."""
        await asyncio.gather(*(asyncio.to_thread(device.start) for device in devices))
        for device in devices:
            await self.until(device.name, State.DEVICE_STATE_READY, State.DEVICE_STATE_BUSY)

    async def devices(self) -> dict[str, devices_pb2.Device]:
        assert self.bench.client is not None
        stub: devices_pb2_grpc.DeviceServiceAsyncStub = devices_pb2_grpc.DeviceServiceStub(self.bench.client.channel)
        found = await stub.ListDevices(devices_pb2.ListDevicesRequest(), timeout=20)
        return {device.info.device_id: device for device in found.devices}

    async def until(self, name: str, *states: int) -> devices_pb2.Device:
        """Return a device once it is in one of the states."""
        async with asyncio.timeout(PATIENCE):
            while True:
                device = (await self.devices()).get(name)
                if device is not None and device.state in states:
                    return device
                await asyncio.sleep(0.05)

    async def submit(self, *targets: dict[str, Any], measure: bool = False, graph: bytes = b"") -> str:
        """Store a pipeline that has come to its engines, for the coordinator to find and drive; return its id."""
        made = spec()
        for target in targets:
            made.engines.add(**target)
        return await asyncio.to_thread(self._store, made, measure, graph)

    def _store(self, made: coordinator_pb2.PipelineSpec, measure: bool, graph: bytes) -> str:
        database = Database(self.bench.database_url)
        try:
            pipeline_id = database.repository.create(made, "", "coordinator")[0].pipeline_id
            done = coordinator_pb2.PipelineResults()
            done.CopyFrom(results(self.bench.store))
            done.ClearField("engines")
            if graph:
                done.export.onnx_trt.CopyFrom(self.bench.store.put_bytes(graph))
            stages = [Stage.STAGE_VALIDATE, Stage.STAGE_SYNTHESIZE, Stage.STAGE_QUANTIZE, Stage.STAGE_EXPORT]
            if measure:
                done.ClearField("evaluation")
            else:
                stages.append(Stage.STAGE_EVALUATE)
            with Session(database.engine) as session, session.begin():
                row = session.get_one(PipelineRow, pipeline_id)
                row.results = done.SerializeToString()
                row.finished_stages = sum(1 << stage for stage in stages)
            return pipeline_id
        finally:
            database.close()

    async def lives(self, count: int, *devices: str) -> None:
        """Return when so many runs are alive or were, the latest of them on these devices."""
        async with asyncio.timeout(PATIENCE):
            while True:
                lives = self.script.lives()
                if len(lives) >= count and {life.device for life in lives[-len(devices) :]} == set(devices):
                    return
                await asyncio.sleep(0.02)

    async def finish(self, pipeline_id: str) -> list[coordinator_pb2.EngineOutcome]:
        """Return what became of the targets of a pipeline that ends well."""
        assert self.bench.client is not None
        return list((await self.bench.client.finish(pipeline_id)).results.engines)

    async def waits(self, pipeline_id: str, what: Callable[[str], bool]) -> str:
        """Return what a pipeline says that it waits for, once that is as wanted."""
        assert self.bench.client is not None
        event = await self.bench.client.until(pipeline_id, lambda event: what(event.progress.phase))
        return event.progress.phase

    def close(self) -> None:
        for device in self._devices:
            device.kill_if_alive()


@asynccontextmanager
async def pool(folder: Path, **settings: object) -> AsyncIterator[Pool]:
    chosen: dict[str, Any] = {
        "device_heartbeat_seconds": 0.5,
        "device_lease_seconds": 60,
        "sweep_seconds": 0.2,
        "device_poll_seconds": 0.1,
        "device_patience_seconds": 60,
        **settings,
    }
    async with bench(folder, **chosen) as made:
        opened = Pool(made, folder)
        try:
            yield opened
        finally:
            await asyncio.to_thread(opened.close)


async def maker(pool: Pool, outcome: coordinator_pb2.EngineOutcome) -> str:
    """Return which device made an engine, told by the engine's own bytes; it comes from the exported graph."""
    assert outcome.WhichOneof("outcome") == "engine", outcome
    content = await asyncio.to_thread(pool.bench.store.read_bytes, outcome.engine.manifest.engine.digest)
    name, _, source = content.decode().partition(" made this from ")
    assert source == "trt" * 1000
    return name
