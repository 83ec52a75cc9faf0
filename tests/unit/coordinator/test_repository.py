"""Stored pipelines: idempotent creation, stable pages, deletion."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from services.common.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from services.coordinator.database import database_engine, parse_url, prepare_database
from services.coordinator.repository import Position
from services.coordinator.statistics import read_statistics
from services.coordinator.transitions import State
from tests.support.pipelines import ME, Database, spec


def test_equal_requests_make_one_pipeline_even_at_once(database: Database) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _n: database.repository.create(spec(), "equal-requests", ME), range(8)))
    assert len({pipeline.pipeline_id for pipeline, _created in made}) == 1
    assert sum(created for _pipeline, created in made) == 1
    assert database.sequences(made[0][0].pipeline_id) == [1]
    with pytest.raises(AlreadyExistsError) as caught:
        database.repository.create(spec(name="other"), "equal-requests", ME)
    assert caught.value.field == "request_id"
    assert database.repository.find(spec(), "equal-requests") is not None
    assert database.repository.find(spec(), "") is None


def test_pages_are_stable_under_inserts_and_deletes(sqlite: Database) -> None:
    old = [sqlite.create() for _ in range(7)]
    first, following = sqlite.repository.page([], None, 3)
    assert [p.pipeline_id for p in first] == old[:3:-1]
    sqlite.create()  # lands before the first page
    sqlite.transitions.request_cancel(old[4])
    sqlite.transitions.finish_cancel(old[4])
    sqlite.repository.delete(old[4])  # the last of the first page
    second, following = sqlite.repository.page([], following, 3)
    assert [p.pipeline_id for p in second] == old[3:0:-1]
    third, following = sqlite.repository.page([], following, 3)
    assert [p.pipeline_id for p in third] == old[:1]
    assert following is None


def test_pages_can_be_of_some_states(sqlite: Database) -> None:
    names = [sqlite.create() for _ in range(4)]
    for name in names[:2]:
        sqlite.transitions.request_cancel(name)
    found, following = sqlite.repository.page([State.PIPELINE_STATE_CANCELLING], None, 10)
    assert [p.pipeline_id for p in found] == [names[1], names[0]]
    assert following is None
    assert sqlite.repository.page([State.PIPELINE_STATE_FAILED], Position(0, ""), 10) == ([], None)
    assert read_statistics(sqlite.engine).by_state == {
        State.PIPELINE_STATE_QUEUED: 2,
        State.PIPELINE_STATE_CANCELLING: 2,
    }
    assert {p.pipeline_id for p in sqlite.repository.unfinished()} == set(names)


def test_only_ended_pipelines_are_deleted_with_all_that_is_theirs(database: Database) -> None:
    name = database.create()
    database.repository.open_job(name, "job", "generator")
    with pytest.raises(FailedPreconditionError, match="cancel it"):
        database.repository.delete(name)
    database.transitions.request_cancel(name)
    database.transitions.finish_cancel(name)
    assert name in database.repository.ended_with_jobs()
    assert database.repository.delete(name) == 1
    assert database.sequences(name) == []
    assert database.repository.open_jobs(name) == []
    with pytest.raises(NotFoundError):
        database.repository.get(name)
    with pytest.raises(NotFoundError):
        database.repository.delete(name)


def test_sqlite_readers_do_not_wait_for_the_writer(sqlite: Database) -> None:
    name = sqlite.create()
    with sqlite.engine.begin() as writer:
        writer.execute(text("UPDATE pipelines SET stage = 5"))
        assert sqlite.repository.get(name).pipeline.stage == 0


@pytest.mark.parametrize("url", ["nonsense", "mysql://a/b", "sqlite://", "sqlite:///:memory:", "other://x/y"])
def test_databases_that_cannot_serve_are_refused(url: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_url(url)
    assert caught.value.field == "database_url"


def test_a_database_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="file/x"):
        prepare_database(database_engine(parse_url(f"sqlite:///{tmp_path}/file/x")))
