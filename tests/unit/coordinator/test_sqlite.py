"""Writers of one SQLite file wait in line."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from services.coordinator.sqlite import Line, LinedConnection, QuickConnection


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., sqlite3.Connection]]:
    made: list[sqlite3.Connection] = []

    def new(kind: type[sqlite3.Connection] = LinedConnection, **settings: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(
            tmp_path / "db", check_same_thread=False, factory=kind, **settings
        )
        made.append(connection)
        return connection

    with closing(new()) as first:
        first.execute("PRAGMA journal_mode=WAL")
        first.execute("CREATE TABLE numbers (number INTEGER PRIMARY KEY)")
    yield new
    for connection in made:
        connection.close()


def test_turns_come_in_the_order_of_arrival_and_do_not_wait_for_ever() -> None:
    line, order = Line(), []
    assert line.enter(0)
    assert not line.enter(0.01)
    arrived = [threading.Event() for _ in range(5)]

    def writer(number: int) -> None:
        arrived[number].set()
        assert line.enter(10)
        order.append(number)
        line.leave()

    with ThreadPoolExecutor(5) as pool:
        for number in range(5):
            ended = pool.submit(writer, number)
            arrived[number].wait()
            while line.length <= number:
                assert not ended.done()
        line.leave()
    assert order == [0, 1, 2, 3, 4]
    assert line.enter(0)


@pytest.mark.parametrize("begin", [None, "BEGIN IMMEDIATE"])
def test_a_writer_never_meets_the_lock_of_another(
    connect: Callable[..., sqlite3.Connection], begin: str | None
) -> None:
    # Without a line, each would fail at once where it meets another: they do not wait for SQLite at all.
    settings: dict[str, Any] = {"timeout": 0.0, "isolation_level": None if begin else "IMMEDIATE"}
    connections = [connect(kind, **settings) for kind in (LinedConnection, QuickConnection) * 2]

    def write(connection: sqlite3.Connection, start: int) -> None:
        for number in range(start, start + 50):
            cursor = connection.cursor()
            if begin:
                cursor.execute(begin)
            cursor.execute("INSERT INTO numbers VALUES (?)", (number,))
            connection.rollback() if number % 5 == 0 else connection.commit()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, connections, range(0, 400, 100)))
    assert connections[0].execute("SELECT count(*) FROM numbers").fetchone() == (160,)


def test_who_fails_or_goes_lets_the_next_one_in(connect: Callable[..., sqlite3.Connection]) -> None:
    first, second = connect(timeout=0.0), connect(timeout=0.0)
    first.cursor().execute("INSERT INTO numbers VALUES (1)")
    first.commit()
    with pytest.raises(sqlite3.IntegrityError):
        first.cursor().execute("INSERT INTO numbers VALUES (1)")
    first.rollback()
    with pytest.raises(sqlite3.OperationalError):
        second.cursor().execute("INSERT INTO nothing VALUES (1)")
    first.cursor().executemany("INSERT INTO numbers VALUES (?)", [(2,), (3,)])
    first.close()
    second.cursor().execute("INSERT INTO numbers VALUES (2)")
    second.commit()


def test_only_what_can_be_made_anew_may_be_lost_in_a_power_cut(connect: Callable[..., sqlite3.Connection]) -> None:
    assert connect().execute("PRAGMA synchronous").fetchone() == (2,)
    assert connect(QuickConnection).execute("PRAGMA synchronous").fetchone() == (1,)
