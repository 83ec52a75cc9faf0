"""Opens the coordinator's database, SQLite or PostgreSQL."""

from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session

from services.common.errors import InvalidArgumentError, UnavailableError
from services.coordinator.schema import upgrade
from services.coordinator.sqlite import BUSY_SECONDS, LinedConnection


def parse_url(text: str) -> URL:
    """Return the database URL with the driver that this project installs.

    Raises:
        InvalidArgumentError: The text is no URL, or names a database other than SQLite (in a file) or PostgreSQL.
    """
    try:
        url = make_url(text)
        backend = url.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise InvalidArgumentError(
            "database_url is not a database URL; it looks like sqlite:////var/lib/granq/coordinator.sqlite or "
            "postgresql://user:password@host/database",
            field="database_url",
        ) from error
    if backend == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise InvalidArgumentError(
                "database_url names an SQLite database in memory, which a restart would lose; give a file",
                field="database_url",
            )
        return url
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    raise InvalidArgumentError(
        f"database_url names {backend}; only sqlite and postgresql are supported", field="database_url"
    )


def sqlite_path(url: URL) -> Path | None:
    """Return the file of an SQLite database, None for PostgreSQL."""
    return Path(str(url.database)) if url.get_backend_name() == "sqlite" else None


def database_engine(url: URL) -> Engine:
    """Return access to the database; nothing is connected yet.

    SQLite runs in write-ahead mode, so that readers never wait for the writer, and takes its write lock at the begin of
    a writing transaction, so that read-then-write never fails half-way; writers wait in line. Committed rows outlive a
    power loss.
    """
    if sqlite_path(url) is not None:
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS, "factory": LinedConnection})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    return create_engine(url, pool_pre_ping=True, pool_size=8, connect_args={"connect_timeout": 10})


def prepare_database(engine: Engine) -> None:
    """Make the tables, or bring those of an older coordinator up.

    Raises:
        UnavailableError: The database cannot be reached or written.
        FailedPreconditionError: A newer coordinator changed the tables.
    """
    path = sqlite_path(engine.url)
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        upgrade(engine)
    except (DBAPIError, OSError) as error:
        raise UnavailableError(
            f"the database {engine.url.render_as_string()} cannot be used: {error}", reason="DATABASE_UNAVAILABLE"
        ) from error


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own transaction handling begins too late (at the first write); SQLAlchemy's begin event does it here.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_SECONDS * 1000}"):
        connection.execute(f"PRAGMA {pragma}")


def read_session(engine: Engine) -> Session:
    """Return a session that only reads: on SQLite it takes no write lock and sees one snapshot."""
    return Session(engine.execution_options(granq_reads=True))


def _begin_sqlite(connection: Connection) -> None:
    reads = connection.get_execution_options().get("granq_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
