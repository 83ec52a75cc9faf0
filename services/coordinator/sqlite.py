"""Connections to an SQLite file whose writers wait in line, those of this process.

SQLite lets one connection write at a time. The others ask again after 1, 2, 5, … 100 ms, and whoever asks at the right
moment is next, so that under load some wait for seconds while newcomers pass them. Here a writer waits for its turn
before it asks SQLite, and asks once. Other processes are not in the line, and excluded by SQLite as ever.
"""

import os
import re
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

BUSY_SECONDS = 30
"""How long a writer waits, in line and then for other processes."""

# What begins a writing transaction: pysqlite's own begin, which comes with the first change, and an explicit one.
_BEGINS_WRITING = re.compile(r"\s*(INSERT|UPDATE|DELETE|REPLACE|BEGIN\s+IMMEDIATE)\b", re.IGNORECASE)


class Line:
    """A lock that goes to those who want it in the order in which they came."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    @property
    def length(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def enter(self, seconds: float) -> bool:
        """Wait for one's turn; return whether it came within a time."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return True
            turn = threading.Event()
            self._waiting.append(turn)
        if turn.wait(seconds):
            return True
        with self._guard:
            if turn.is_set():  # it came at the last moment
                return True
            self._waiting.remove(turn)
            return False

    def leave(self) -> None:
        """End one's turn."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False


@cache
def _line(path: str) -> Line:
    return Line()


class _Cursor(sqlite3.Cursor):
    """Waits for the connection's turn before it begins to write."""

    connection: "LinedConnection"

    def execute(self, sql: str, parameters: Any = (), /) -> "_Cursor":
        return self.connection.in_turn(sql, lambda: super(_Cursor, self).execute(sql, parameters))

    def executemany(self, sql: str, parameters: Any, /) -> "_Cursor":
        return self.connection.in_turn(sql, lambda: super(_Cursor, self).executemany(sql, parameters))


class LinedConnection(sqlite3.Connection):
    """A connection that holds its place at the head of its file's line from the begin of a write to its end.

    The line is a matter of order alone: where it does not move, because some transaction takes very long, SQLite's own
    lock decides, as it does among processes.
    """

    def __init__(self, database: str, *arguments: Any, **named: Any) -> None:
        super().__init__(database, *arguments, **named)
        self._line = _line(os.path.realpath(database))
        self._first = False

    def in_turn(self, sql: str, execute: "Callable[[], _Cursor]") -> _Cursor:
        """Run a statement, in turn when it begins to write."""
        if not self._first and not self.in_transaction and _BEGINS_WRITING.match(sql):
            self._first = self._line.enter(BUSY_SECONDS)
        try:
            return execute()
        finally:
            self._leave_after_end()

    def cursor(self, factory: Any = _Cursor) -> Any:
        """Return a cursor that waits for its turn."""
        return super().cursor(factory)

    def commit(self) -> None:
        """Commit, and let the next writer begin."""
        try:
            super().commit()
        finally:
            self._leave_after_end()

    def rollback(self) -> None:
        """Roll back, and let the next writer begin."""
        try:
            super().rollback()
        finally:
            self._leave_after_end()

    def close(self) -> None:
        """Close, which rolls back what was begun."""
        try:
            super().close()
        finally:
            self._leave()

    def _leave_after_end(self) -> None:
        if not self.in_transaction:
            self._leave()

    def _leave(self) -> None:
        if self._first:
            self._first = False
            self._line.leave()


class QuickConnection(LinedConnection):
    """One whose last commits a power cut may take back, but no end of the process: for what can be made anew."""

    def __init__(self, database: str, *arguments: Any, **named: Any) -> None:
        super().__init__(database, *arguments, **named)
        self.execute("PRAGMA synchronous=NORMAL")
