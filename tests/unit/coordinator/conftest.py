"""Fixtures of the coordinator's unit tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.artifacts import ArtifactStore
from services.coordinator.threads import Threads
from tests.support.pipelines import Database, sqlite_url
from tests.support.postgres import postgres_server


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres_server() as server:
        yield server.url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database of each kind; the PostgreSQL one is shared, so tests look at their own pipelines only."""
    url = sqlite_url(tmp_path) if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    opened = Database(url)
    yield opened
    opened.close()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    opened = Database(sqlite_url(tmp_path))
    yield opened
    opened.close()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore((tmp_path / "artifacts").as_uri())


@pytest.fixture
def threads() -> Iterator[Threads]:
    pool = Threads(4, "test")
    yield pool
    pool.close()
