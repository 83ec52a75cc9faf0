from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from granq.v1 import common_pb2
from services.common.artifacts import ArtifactStore
from services.common.rpc import GrpcServer
from services.generator.server import create_server
from services.generator.settings import GeneratorSettings
from tests.support.teachers import teacher


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def settings(tmp_path: Path) -> GeneratorSettings:
    return GeneratorSettings(
        port=0,
        metrics_port=0,
        artifact_url=(tmp_path / "store").as_uri(),
        torch_threads=1,
        synthesis_threads=1,
        max_co_train_streams=1,
        co_train_wait_seconds=3,
        grace_seconds=1,
    )


@pytest.fixture
def store(settings: GeneratorSettings) -> ArtifactStore:
    return ArtifactStore(settings.artifact_url)


@pytest.fixture
def model(store: ArtifactStore, tmp_path: Path) -> common_pb2.ModelSource:
    return teacher(store, tmp_path)


@pytest.fixture
async def server(settings: GeneratorSettings) -> AsyncIterator[GrpcServer]:
    server = create_server(settings)
    await server.start()
    yield server
    await server.stop(0)
