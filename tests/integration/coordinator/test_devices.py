"""The pool of devices: real coordinator, evaluators in processes of their own, scripted builds."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from granq.v1 import common_pb2
from services.evaluator import runtimes
from tests.support.device_pool import State, maker, pool
from tests.support.onnx_graphs import quantized
from tests.support.proxy import Proxies
from tests.support.servers import ServerProcess

LEASE = 3.0
ORIN = {"name": "orin", "runtime": common_pb2.RUNTIME_TENSORRT, "platform": "linux-aarch64"}
THOR = {"name": "thor", "runtime": common_pb2.RUNTIME_TENSORRT, "compute_capabilities": ["11.0"]}


@pytest.fixture
def proxies() -> Iterator[Proxies]:
    with Proxies() as made:
        yield made


async def test_targets_go_to_their_devices_side_by_side_and_are_measured_there(tmp_path: Path) -> None:
    async with pool(tmp_path) as made:
        await made.start(made.device("nano"), made.device("bench", capability="11.0", device_targets="thor"))
        for name in ("nano", "bench"):
            made.script.hold(name)
        unknown = {"name": "old", "runtime": common_pb2.RUNTIME_TENSORRT, "runtime_version": "8"}
        pipeline = await made.submit(ORIN, THOR, unknown, {"runtime": common_pb2.RUNTIME_TENSORRT_RTX}, measure=True)
        await made.lives(2, "nano", "bench")
        busy = await made.devices()
        assert {device.state for device in busy.values()} == {State.DEVICE_STATE_BUSY}
        assert {device.pipeline_id for device in busy.values()} == {pipeline}
        for name in ("nano", "bench"):
            made.script.let_go(name)
        orin, thor, old, rtx = await made.finish(pipeline)
        assert (await maker(made, orin), await maker(made, thor)) == ("nano", "bench")
        assert old.failure.code == 9
        assert "it has TensorRT 10.3.0, not 8" in old.failure.message
        assert "it is meant for thor" in old.failure.message
        assert rtx.HasField("engine"), "what no device builds goes to the configured evaluator, as ever"
        assert made.bench.client is not None
        measured = (await made.bench.client.get(pipeline)).results.evaluation
        assert {row.target: row.device for row in measured.measurements if row.target} == {
            "orin": "nano",
            "thor": "bench",
        }
        one, other = (life for life in made.script.lives() if life.done)
        assert one.meets(other), "two devices build at the same time"
        assert {device.state for device in (await made.devices()).values()} == {State.DEVICE_STATE_READY}


async def test_a_device_behind_nat_needs_no_port_and_no_store(tmp_path: Path) -> None:
    async with pool(tmp_path) as made:
        device = made.device("jetson", dial_out="true", artifact_url=f"granq://{made.address}")
        await made.start(device)
        assert (await made.devices())["jetson"].info.address == ""
        sockets = psutil.Process(device.pid).net_connections("tcp")
        listening = {s.laddr.ip.removeprefix("::ffff:") for s in sockets if s.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}, "health and metrics are for the device itself"
        made.script.hold("jetson")
        pipeline = await made.submit(ORIN)
        await made.lives(1, "jetson")
        made.script.let_go("jetson")
        (outcome,) = await made.finish(pipeline)
        assert await maker(made, outcome) == "jetson"
        assert await asyncio.to_thread(device.stop) == 0
        assert (await made.until("jetson", State.DEVICE_STATE_AWAY)).detail == "deregistered"


async def test_a_device_that_restarts_in_mid_build_goes_on_at_once(tmp_path: Path) -> None:
    async with pool(tmp_path, device_heartbeat_seconds=10) as made:
        device = made.device("nano")
        await made.start(device)
        made.script.hold("nano")
        pipeline = await made.submit(ORIN)
        await made.lives(1, "nano")
        await asyncio.to_thread(device.kill)
        await asyncio.to_thread(device.start)
        await made.lives(2, "nano")
        made.script.let_go("nano")
        (outcome,) = await made.finish(pipeline)
        assert await maker(made, outcome) == "nano"
        made.script.assert_never_two_at_once()


async def test_the_job_of_a_dead_device_goes_to_another_once_its_lease_has_ended(tmp_path: Path) -> None:
    async with pool(tmp_path, device_lease_seconds=LEASE) as made:
        first, second = made.device("first"), made.device("second", dial_out="true")
        await made.start(first)
        made.script.hold("first")
        pipeline = await made.submit(ORIN)
        await made.lives(1, "first")
        await made.start(second)
        died = time.monotonic()
        await asyncio.to_thread(first.kill)
        (outcome,) = await made.finish(pipeline)
        assert await maker(made, outcome) == "second"
        taken = made.script.lives()[-1].begin
        assert taken - died > LEASE / 2, "the lease is waited for: the device might have been cut off, not dead"
        made.script.assert_never_two_at_once()
        assert made.bench.client is not None
        causes = [event.failure.reason for event in await made.bench.client.follow(pipeline)]
        assert "DEVICE_LOST" in causes


async def test_a_device_that_is_cut_off_ends_its_job_before_another_begins_it(tmp_path: Path, proxies: Proxies) -> None:
    async with pool(tmp_path, device_lease_seconds=LEASE) as made:
        net = proxies.add("network", lambda: ("127.0.0.1", made.port))
        cut = made.device("cut", net.address, dial_out="true")
        await made.start(cut)
        made.script.hold("cut")
        pipeline = await made.submit(ORIN)
        await made.lives(1, "cut")
        net.cut()
        await made.until("cut", State.DEVICE_STATE_AWAY)
        await made.start(made.device("other"))
        (outcome,) = await made.finish(pipeline)
        assert await maker(made, outcome) == "other"
        made.script.assert_never_two_at_once()
        net.mend()
        await made.until("cut", State.DEVICE_STATE_READY)


async def test_a_device_that_is_cut_off_for_a_moment_keeps_its_job(tmp_path: Path, proxies: Proxies) -> None:
    async with pool(tmp_path) as made:
        net = proxies.add("network", lambda: ("127.0.0.1", made.port))
        await made.start(made.device("cut", net.address, dial_out="true"))
        made.script.hold("cut")
        pipeline = await made.submit(ORIN)
        await made.lives(1, "cut")
        net.cut()
        await made.until("cut", State.DEVICE_STATE_AWAY)
        net.mend()
        await made.until("cut", State.DEVICE_STATE_BUSY)
        made.script.let_go("cut")
        await made.finish(pipeline)
        assert len(made.script.lives()) == 1


async def test_a_target_whose_device_stays_away_fails_and_says_who_is_awaited(tmp_path: Path) -> None:
    async with pool(tmp_path, device_patience_seconds=1) as made:
        device = made.device("nano")
        await made.start(device)
        assert await asyncio.to_thread(device.stop) == 0
        pipeline = await made.submit(ORIN)
        text = await made.waits(pipeline, lambda phase: "waits" in phase)
        assert text == "orin: waits for a device: nano (deregistered)"
        (outcome,) = await made.finish(pipeline)
        assert (outcome.failure.code, outcome.failure.reason) == (9, "DEVICE_AWAY")
        assert "an engine for orin (TensorRT, linux-aarch64) needs a device" in outcome.failure.message
        assert "nano (deregistered)" in outcome.failure.message


async def test_two_pipelines_take_turns_on_one_device(tmp_path: Path) -> None:
    async with pool(tmp_path) as made:
        await made.start(made.device("nano"))
        made.script.hold("nano")
        first = await made.submit(ORIN)
        await made.lives(1, "nano")
        second = await made.submit(ORIN)
        text = await made.waits(second, lambda phase: "waits" in phase)
        assert text == f"orin: waits for a device: nano (has a job of pipeline {first})"
        made.script.let_go("nano")
        for pipeline in (first, second):
            (outcome,) = await made.finish(pipeline)
            assert await maker(made, outcome) == "nano"
        assert len([life for life in made.script.lives() if life.done]) == 2
        made.script.assert_never_two_at_once()


async def test_a_restarted_coordinator_goes_on_with_the_job_that_runs(tmp_path: Path) -> None:
    async with pool(tmp_path) as made:
        await made.start(made.device("dials", dial_out="true"), made.device("dialled", capability="11.0"))
        for name in ("dials", "dialled"):
            made.script.hold(name)
        pipeline = await made.submit({**ORIN, "compute_capabilities": ["8.7"]}, THOR)
        await made.lives(2, "dials", "dialled")
        assert made.bench.coordinator is not None
        port = made.bench.coordinator.port
        await made.bench.stop_coordinator()
        await made.bench.start_coordinator(port=port)
        for name in ("dials", "dialled"):
            await made.until(name, State.DEVICE_STATE_BUSY)
            made.script.let_go(name)
        orin, thor = await made.finish(pipeline)
        assert (await maker(made, orin), await maker(made, thor)) == ("dials", "dialled")
        assert len(made.script.lives()) == 2, "each was built once"


async def test_a_cancelled_pipeline_frees_its_device(tmp_path: Path) -> None:
    async with pool(tmp_path) as made:
        await made.start(made.device("nano", dial_out="true"))
        made.script.hold("nano")
        pipeline = await made.submit(ORIN)
        await made.lives(1, "nano")
        assert made.bench.client is not None
        await made.bench.client.cancel(pipeline)
        await made.until("nano", State.DEVICE_STATE_READY)
        made.script.let_go("nano")
        assert [life.done for life in made.script.lives()] == [False]


async def test_a_device_that_stops_gives_its_job_away_at_once(tmp_path: Path) -> None:
    async with pool(tmp_path, device_heartbeat_seconds=10) as made:
        first, second = (made.device(name) for name in ("first", "second"))
        await made.start(first)
        made.script.hold("first")
        pipeline = await made.submit(ORIN)
        await made.lives(1, "first")
        await made.start(second)
        assert await asyncio.to_thread(first.stop) == 0
        (outcome,) = await made.finish(pipeline)
        assert await maker(made, outcome) == "second"
        made.script.assert_never_two_at_once()


@pytest.mark.skipif(runtimes.TENSORRT_RTX.version() is None, reason="tensorrt-rtx is not installed")
async def test_a_real_engine_from_an_evaluator_that_dials_out(tmp_path: Path) -> None:
    async with pool(tmp_path) as made:
        own = tmp_path / "rtx"
        own.mkdir()
        settings = {"coordinator_address": made.address, "device_id": "rtx", "artifact_url": f"granq://{made.address}"}
        device = ServerProcess("evaluator", own, dial_out="true", device_targets="rtx-ada", **settings)
        try:
            await asyncio.to_thread(device.start)
            await made.until("rtx", State.DEVICE_STATE_READY)
            target = {"name": "rtx-ada", "runtime": common_pb2.RUNTIME_TENSORRT_RTX, "compute_capabilities": ["8.9"]}
            (outcome,) = await made.finish(await made.submit(target, graph=quantized().SerializeToString()))
            assert outcome.HasField("engine"), outcome
            manifest = outcome.engine.manifest
            assert list(manifest.compute_capabilities) == ["8.9"]
            assert manifest.engine.size_bytes > 10_000
            await asyncio.to_thread(made.bench.store.verify, manifest.engine.digest)
            assert outcome.engine.int8_layers > 0
            assert (own / "cache" / "blobs").is_dir(), "the device worked on copies of its own"
        finally:
            await asyncio.to_thread(device.kill_if_alive)
