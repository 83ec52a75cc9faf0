"""`python -m services.common.rpc.health` against a real server: what Docker's HEALTHCHECK sees."""

import asyncio
import os
import subprocess
import sys

import pytest

from services.common.rpc import GrpcServer
from services.common.settings import ServerSettings


async def ask(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.common.rpc.health", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRANQ_")}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env={**environment, **variables}, capture_output=True, text=True, timeout=60, check=False
        )

    return await asyncio.to_thread(run)


async def test_a_server_that_serves_is_healthy_until_it_ends() -> None:
    server = GrpcServer("toy", ServerSettings(port=0, metrics_port=0))
    await server.start()
    try:
        by_address, by_port = await asyncio.gather(
            ask(f"127.0.0.1:{server.port}"), ask(GRANQ_PORT=str(server.port), GRANQ_HEALTH_PORT="")
        )
        assert (by_address.returncode, by_address.stderr) == (0, "")
        assert by_port.returncode == 0
    finally:
        await server.stop(0)
    ended = await ask(f"127.0.0.1:{server.port}")
    assert ended.returncode == 1
    assert "does not serve: UNAVAILABLE" in ended.stderr


async def test_a_server_that_is_about_to_end_is_not_healthy() -> None:
    server = GrpcServer("toy", ServerSettings(port=0, metrics_port=0))
    await server.start()
    try:
        await server._health.enter_graceful_shutdown()
        asked = await ask(f"127.0.0.1:{server.port}")
    finally:
        await server.stop(0)
    assert asked.returncode == 1
    assert "NOT_SERVING" in asked.stderr


@pytest.mark.parametrize("arguments", [(), ("a:1", "b:2")])
async def test_without_one_address_it_says_how_it_is_called(arguments: tuple[str, ...]) -> None:
    asked = await ask(*arguments)
    assert asked.returncode == 2
    assert "usage" in asked.stderr
