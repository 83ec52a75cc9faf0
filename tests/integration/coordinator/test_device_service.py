"""DeviceService of a real coordinator: the lease, the stream, the list, and the store behind it."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner, Result

import granq
from granq.cli.app import build
from granq.cli.exits import Exit
from granq.v1 import common_pb2, devices_pb2, devices_pb2_grpc, evaluator_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import InvalidArgumentError, NotFoundError, UnauthenticatedError, UnavailableError
from services.common.jobs import JobManager
from services.evaluator.coordinator_client import CoordinatorClient
from services.evaluator.serving import CallServing
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.starting import JobStarter
from tests.support.certificates import TOKENS, Authority, credential
from tests.support.coordinator import Bench, bench

READY = devices_pb2.DEVICE_STATE_READY
ONE, TWO = "1" * 32, "2" * 32


class Devices:
    """Calls as devices make them."""

    def __init__(self, made: Bench) -> None:
        assert made.client is not None
        assert made.coordinator is not None
        self.bench = made
        self.address = f"127.0.0.1:{made.coordinator.port}"
        self.stub: devices_pb2_grpc.DeviceServiceAsyncStub = devices_pb2_grpc.DeviceServiceStub(made.client.channel)

    async def register(self, name: str, instance: str = ONE, **info: Any) -> devices_pb2.RegisterDeviceResponse:
        described = devices_pb2.DeviceInfo(device_id=name, platform="linux-aarch64", **info)
        request = devices_pb2.RegisterDeviceRequest(info=described, instance_id=instance)
        return await self.stub.RegisterDevice(request, timeout=20)

    async def granq(self, *arguments: str) -> Result:
        command = [*arguments, "--address", self.address]
        return await asyncio.to_thread(CliRunner(env={"COLUMNS": "240"}).invoke, build(), command)


@pytest.fixture
async def devices(tmp_path: Path) -> AsyncIterator[Devices]:
    async with bench(tmp_path) as made:
        yield Devices(made)


async def test_who_is_in_the_pool_is_listed_and_who_is_gone_forgotten(devices: Devices) -> None:
    runtime = evaluator_pb2.RuntimeInfo(runtime=common_pb2.RUNTIME_TENSORRT, version="10.3.0")
    terms = await devices.register(
        "nano",
        gpu="Orin [nvgpu]",
        compute_capability="8.7",
        runtimes=[runtime],
        memory_bytes=8 * 1024**3,
        targets=["jetson-orin-nano"],
        labels={"plant": "graz"},
    )
    assert (terms.heartbeat_seconds, terms.lease_seconds) == (10, 60)
    await devices.register("bench", address="10.0.0.7:50053")
    result = await devices.granq("devices", "list")
    assert result.exit_code == Exit.OK, result.output
    nano = next(line for line in result.output.splitlines() if line.startswith("nano"))
    for text in (
        "AWAY: its stream is not open here",
        "TensorRT 10.3.0",
        "Orin [nvgpu] (sm 8.7)",
        "8.0 GiB",
        "it dials",
    ):
        assert text in nano
    assert "READY" in result.output
    assert "10.0.0.7:50053" in result.output
    # In a process of its own: the server's log goes to this one's output.
    command = (sys.executable, "-m", "granq.cli", "devices", "list", "--json", "--address", devices.address)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    found = json.loads((await process.communicate())[0])
    assert [device["info"]["device_id"] for device in found] == ["bench", "nano"]
    assert found[1]["info"]["labels"] == {"plant": "graz"}
    refused = await devices.granq("devices", "remove", "nano")
    assert refused.exit_code == Exit.REFUSED
    assert "stop its evaluator" in refused.output
    await devices.stub.DeregisterDevice(devices_pb2.DeregisterDeviceRequest(device_id="nano", instance_id=ONE))
    assert (await devices.granq("devices", "remove", "nano")).exit_code == Exit.OK
    with granq.Client(devices.address) as client:
        assert [device.info.device_id for device in await asyncio.to_thread(client.devices)] == ["bench"]


async def test_what_a_device_tells_of_itself_is_checked(devices: Devices) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"address": "http://evil/"}, "info.address"),
        ({"compute_capability": "87"}, "info.compute_capability"),
        ({"targets": ["Jetson"]}, "info.targets[0]"),
        ({"labels": {"k": "x" * 129}}, 'info.labels["k"]'),
    )
    for info, field in wrong:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await devices.register("nano", **info)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert field in (caught.value.details() or "")


async def test_only_the_registered_instance_has_a_lease_and_a_stream(devices: Devices) -> None:
    await devices.register("nano")
    with pytest.raises(grpc.aio.AioRpcError) as taken:
        await devices.register("nano", TWO)
    assert taken.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await devices.stub.SendHeartbeat(
            devices_pb2.SendHeartbeatRequest(device_id="nano", instance_id=TWO), timeout=20
        )
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    for first, code in (
        (_greeting(TWO), grpc.StatusCode.NOT_FOUND),
        (devices_pb2.ServeJobsRequest(watch_end=devices_pb2.WatchEnd()), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        stream = devices.stub.ServeJobs(_messages(first), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(stream))
        assert refused.value.code() == code


async def test_a_second_stream_ends_the_first_and_the_coordinators_end_ends_the_second(devices: Devices) -> None:
    await devices.register("nano")
    first = aiter(devices.stub.ServeJobs(_messages(_greeting(ONE)), timeout=60))
    assert (await anext(first)).WhichOneof("payload") == "welcome"
    second = aiter(devices.stub.ServeJobs(_messages(_greeting(ONE)), timeout=60))
    assert (await anext(second)).WhichOneof("payload") == "welcome"
    assert await anext(first, None) is None
    found = (await devices.stub.ListDevices(devices_pb2.ListDevicesRequest())).devices
    assert [device.state for device in found] == [devices_pb2.DEVICE_STATE_READY]
    assert devices.bench.coordinator is not None
    async with asyncio.timeout(20):
        stopping = asyncio.create_task(devices.bench.coordinator.stop(60))
        assert await anext(second, None) is None
        await stopping


async def test_a_connection_that_is_renewed_ends_its_stream_as_unavailable(devices: Devices, tmp_path: Path) -> None:
    """Not as cancelled, which would end the device's life in the pool."""
    await devices.register("nano")
    settings = EvaluatorSettings(cache_dir=tmp_path)
    client = CoordinatorClient(devices.address, settings, max_message_bytes=4 * 1024**2, timeout_seconds=20)
    jobs = JobManager(devices.bench.store, settings, {}, 1)
    serving = asyncio.create_task(client.serve("nano", ONE, CallServing(JobStarter(jobs), jobs)))
    async with asyncio.timeout(20):
        while (await devices.stub.ListDevices(devices_pb2.ListDevicesRequest())).devices[0].state != READY:
            await asyncio.sleep(0.02)
        await client.close()
        with pytest.raises(UnavailableError):
            await serving


async def test_the_store_behind_the_coordinator(devices: Devices, tmp_path: Path) -> None:
    """What a device stores is in the coordinator's store, and what is there it reads; references are its own."""
    content = b"graph" * 500_000

    def use() -> None:
        there = devices.bench.store
        store = ArtifactStore(f"granq://{devices.address}", tmp_path / "device")
        made = store.put_bytes(b"engine")
        assert there.read_bytes(made.digest) == b"engine"
        uploaded = there.put_bytes(content)
        assert store.stat(uploaded.digest).size_bytes == len(content)
        assert store.local_path(uploaded.digest).read_bytes() == content
        assert store.read_bytes(uploaded.digest) == content
        with pytest.raises(NotFoundError):
            store.read_bytes("sha256:" + "0" * 64)
        store.set_ref("jobs/one/request", b"digest")
        assert (store.get_ref("jobs/one/request"), there.get_ref("jobs/one/request")) == (b"digest", None)
        assert store.list_refs("jobs/") == ["jobs/one/request"]

    await asyncio.to_thread(use)
    with pytest.raises(InvalidArgumentError, match="granq://host:port"):
        ArtifactStore("granq:///folder", tmp_path / "device")


async def test_a_device_shows_its_token_over_tls_for_its_lease_and_for_its_artifacts(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue()
    people, token = tmp_path / "principals.toml", tmp_path / "token"
    people.write_text(credential("nano", ["service", "read", "submit"], TOKENS["alice"]))
    token.write_text(TOKENS["alice"])
    async with bench(tmp_path, tls_certificate=certificate, tls_key=key, principals_file=people) as made:
        assert made.coordinator is not None
        address = f"localhost:{made.coordinator.port}"
        request = devices_pb2.RegisterDeviceRequest(
            info=devices_pb2.DeviceInfo(device_id="nano", platform="linux-aarch64"), instance_id=ONE
        )

        async def use(**shown: Any) -> bytes:
            settings = EvaluatorSettings(cache_dir=tmp_path, tls_ca=authority.path, **shown)
            client = CoordinatorClient(address, settings, max_message_bytes=4 * 1024**2, timeout_seconds=20)
            try:
                await client.register(request)
            finally:
                await client.close()
            store = ArtifactStore(f"granq://{address}", tmp_path / "device", settings)
            engine = await asyncio.to_thread(store.put_bytes, b"engine")
            return made.store.read_bytes(engine.digest)

        with pytest.raises(UnauthenticatedError):
            await use()
        assert await use(service_token_file=token) == b"engine"
        stranger = ArtifactStore(f"granq://{address}", tmp_path / "stranger", EvaluatorSettings(tls_ca=authority.path))
        with pytest.raises(UnauthenticatedError):
            await asyncio.to_thread(stranger.put_bytes, b"another")


def test_a_store_behind_no_coordinator_is_unavailable(tmp_path: Path) -> None:
    store = ArtifactStore("granq://127.0.0.1:1", tmp_path)
    with pytest.raises(UnavailableError):
        store.put_bytes(b"engine")


def _greeting(instance: str) -> devices_pb2.ServeJobsRequest:
    return devices_pb2.ServeJobsRequest(greeting=devices_pb2.ServeJobsGreeting(device_id="nano", instance_id=instance))


async def _messages(first: devices_pb2.ServeJobsRequest) -> AsyncIterator[devices_pb2.ServeJobsRequest]:
    yield first
    await asyncio.Event().wait()
