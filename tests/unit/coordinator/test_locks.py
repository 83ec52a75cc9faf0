"""Executor locks: one living process per id, free in the moment its holder dies."""

import subprocess
import sys

import pytest
from sqlalchemy import text

from services.common.errors import FailedPreconditionError
from services.coordinator.locks import ExecutorLocks
from tests.support.pipelines import Database

_HOLDER = """
import sys
from services.coordinator.database import parse_url
from services.coordinator.locks import ExecutorLocks
held = ExecutorLocks(parse_url(sys.argv[1])).hold("pod-0", 5)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_holder_is_refused_until_the_first_lets_go(database: Database) -> None:
    locks = ExecutorLocks(database.url)
    assert not locks.is_live("pod-9")
    with locks.hold("pod-9", 5):
        assert locks.is_live("pod-9")
        assert not locks.is_live("pod-1")
        with pytest.raises(FailedPreconditionError) as caught:
            locks.hold("pod-9", patience_seconds=0.2)
        assert caught.value.field == "executor_id"
    assert not locks.is_live("pod-9")
    locks.hold("pod-9", 5).close()


def test_a_killed_holder_frees_the_lock(database: Database) -> None:
    locks = ExecutorLocks(database.url)
    url = database.url.render_as_string(hide_password=False)
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert locks.is_live("pod-0")
        holder.kill()
        holder.wait()
    locks.hold("pod-0", patience_seconds=5).close()


def test_a_lock_that_the_database_lost_is_taken_again(postgres_url: str) -> None:
    database = Database(postgres_url)
    with ExecutorLocks(database.url).hold("pod-7", 5) as held:
        with database.engine.begin() as connection:
            query = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
            assert connection.scalar(text(query))
        assert held.renew()
        assert ExecutorLocks(database.url).is_live("pod-7")
    database.close()
