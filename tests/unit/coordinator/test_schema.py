"""Bringing the tables up: new, version 1, newer than known, and many coordinators at once; SQLite and PostgreSQL."""

import sqlite3
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Engine, make_url, text

from granq.v1 import coordinator_pb2
from services.common.errors import FailedPreconditionError
from services.coordinator import schema
from services.coordinator.database import database_engine, parse_url, prepare_database
from services.coordinator.repository import Repository
from services.coordinator.transitions import JobCursor, State, Transitions
from tests.support.pipelines import progress, sqlite_url

V1 = Path(__file__).resolve().parents[2] / "data" / "coordinator_v1"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A database without tables."""
    if request.param == "sqlite":
        url = parse_url(sqlite_url(tmp_path))
    else:
        server, name = request.getfixturevalue("postgres_url"), f"schema_{uuid.uuid4().hex}"
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        url = parse_url(make_url(server).set(database=name).render_as_string(hide_password=False))
    engine = database_engine(url)
    yield engine
    engine.dispose()


def load_version_1(url: URL) -> None:
    """Fill a database as a coordinator of version 1 left it: one pipeline in its second stage."""
    script = (V1 / f"{url.get_backend_name()}.sql").read_text()
    if url.get_backend_name() == "sqlite":
        with sqlite3.connect(str(url.database)) as sqlite:
            sqlite.executescript(script)
        sqlite.close()
    else:
        with psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
            connection.execute(script.encode())


def revision(engine: Engine) -> str | None:
    with engine.connect() as connection:
        return schema.current_revision(connection)


def test_the_revisions_make_the_tables_that_the_code_declares(empty: Engine) -> None:
    prepare_database(empty)
    assert revision(empty) == schema.newest_revision()
    with empty.connect() as connection:
        context = MigrationContext.configure(connection, opts={**schema.migration_options(), "compare_type": True})
        assert compare_metadata(context, schema.migration_options()["target_metadata"]) == []


def test_revisions_are_one_line() -> None:
    script = ScriptDirectory.from_config(schema._config())
    assert len(script.get_heads()) == 1, "two revisions follow the same one: give the later one the other's number"
    numbers = [found.revision for found in script.walk_revisions()]
    assert numbers == sorted(numbers, reverse=True)


def test_a_database_of_version_1_is_taken_over_with_its_pipeline(empty: Engine) -> None:
    load_version_1(empty.url)
    prepare_database(empty)
    assert revision(empty) == schema.newest_revision()

    repository, transitions = Repository(empty), Transitions(empty, lambda _pipeline_id: None)
    (pipeline,), _ = repository.page([], None, 10)
    name = pipeline.pipeline_id
    assert (pipeline.state, pipeline.stage) == (State.PIPELINE_STATE_RUNNING, coordinator_pb2.STAGE_SYNTHESIZE)
    assert pipeline.spec.model.artifact.digest.startswith("sha256:")
    assert [event.sequence for event in repository.events(name, 0, 10)] == [1, 2, 3, 4]
    assert repository.open_job(name, "job-a", "generator") == JobCursor("run", 3)
    # It goes on where it was: the finished stage stays finished, events are numbered on, and its request is known.
    assert not transitions.enter_stage(name, 1, coordinator_pb2.STAGE_VALIDATE)
    transitions.record_progress(name, 1, progress(8), "job-a", JobCursor("run", 4))
    assert repository.get(name).pipeline.last_sequence == 5
    found = repository.find(pipeline.spec, "nightly")
    assert found is not None
    assert found.pipeline_id == name


def test_a_coordinator_of_version_1_is_turned_away(empty: Engine) -> None:
    load_version_1(empty.url)
    prepare_database(empty)
    with empty.connect() as connection:
        # It takes the one version 1, and writes that where it finds none.
        assert connection.scalars(text("SELECT version FROM coordinator_schema")).all() == [2]


def test_newer_tables_are_refused_and_left_as_they_are(empty: Engine) -> None:
    prepare_database(empty)
    with empty.begin() as connection:
        connection.execute(text("UPDATE coordinator_revision SET version_num = '9999'"))
    with pytest.raises(FailedPreconditionError, match=r"revision 9999.* newer") as caught:
        prepare_database(empty)
    assert caught.value.reason == "DATABASE_NEWER"
    assert revision(empty) == "9999"


@pytest.mark.parametrize("before", ["nothing", "version 1"])
def test_coordinators_that_start_at_once_do_not_disturb_each_other(empty: Engine, before: str) -> None:
    if before == "version 1":
        load_version_1(empty.url)
    engines = [database_engine(empty.url) for _ in range(4)]
    together = threading.Barrier(len(engines))

    def start(engine: Engine) -> None:
        together.wait()
        prepare_database(engine)
        engine.dispose()

    with ThreadPoolExecutor(len(engines)) as pool:
        for outcome in [pool.submit(start, engine) for engine in engines]:
            outcome.result()
    assert revision(empty) == schema.newest_revision()


def test_a_revision_that_fails_leaves_everything_as_it_was(empty: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    load_version_1(empty.url)

    def upgrade_and_die(*arguments: object) -> None:
        upgrade(*arguments)  # type: ignore[arg-type]
        raise OSError("power cut")

    upgrade = command.upgrade
    monkeypatch.setattr(command, "upgrade", upgrade_and_die)
    with pytest.raises(OSError, match="power cut"):
        schema.upgrade(empty)
    assert revision(empty) is None
    with empty.connect() as connection:
        assert connection.scalars(text("SELECT version FROM coordinator_schema")).all() == [1]
    monkeypatch.undo()
    prepare_database(empty)
    assert len(Repository(empty).page([], None, 10)[0]) == 1


def test_copying_a_table_keeps_the_rows_that_point_to_it(tmp_path: Path) -> None:
    """SQLite drops the original after the copy, and events and jobs would go with their pipelines."""
    engine = database_engine(parse_url(sqlite_url(tmp_path)))
    load_version_1(engine.url)
    with engine.connect() as connection:
        schema._set_foreign_keys(connection, on=False)
        with connection.begin():
            connection.execute(text("CREATE TABLE copy AS SELECT * FROM pipelines"))
            connection.execute(text("DROP TABLE pipelines"))
            connection.execute(text("ALTER TABLE copy RENAME TO pipelines"))
            assert connection.scalar(text("SELECT count(*) FROM pipeline_events")) == 4
        schema._set_foreign_keys(connection, on=True)
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1
    engine.dispose()
