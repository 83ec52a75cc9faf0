"""Brings the coordinator's tables to the revision that this code needs, with alembic.

All of it happens in one transaction that excludes every other coordinator on the database: SQLite's write lock, or an
advisory lock of PostgreSQL. So coordinators that start at once do not disturb each other, and one that dies half-way
leaves the tables as they were.
"""

import hashlib
import logging
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from services.common.errors import FailedPreconditionError, InternalError
from services.common.logs import get_logger
from services.coordinator.tables import Base

_REVISION_TABLE = "coordinator_revision"
# Tables from before there were revisions: they are those of the first one.
_UNREVISED_TABLE = "coordinator_schema"
_FIRST_REVISION = "0001"
_LOCK_KEY = int.from_bytes(hashlib.sha256(b"granq.schema").digest()[:8], signed=True)

log = get_logger(__name__)


def migration_options() -> dict[str, Any]:
    """Return how alembic is to treat this database."""
    return {
        "target_metadata": Base.metadata,
        "version_table": _REVISION_TABLE,
        # SQLite changes most of a table by copying it.
        "render_as_batch": True,
        "transactional_ddl": True,
    }


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "services.coordinator:migrations")
    return config


def newest_revision() -> str:
    """Return the revision of the tables that this code needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    if head is None:
        raise InternalError("this installation has no revisions of the coordinator's tables; install it again")
    return head


def current_revision(connection: Connection) -> str | None:
    """Return the revision of the tables in a database; None where there is none."""
    return MigrationContext.configure(connection, opts=migration_options()).get_current_revision()


def upgrade(engine: Engine) -> None:
    """Make the tables, or bring older ones up; pipelines in them stay.

    Raises:
        FailedPreconditionError: A newer coordinator brought the tables further than this one knows.
    """
    # What it tells at each start, even where nothing is to do; the one line that counts is written below.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with engine.connect() as connection:
        # A table that SQLite copies is dropped after it, which would delete, by cascade, the rows that point to it. The
        # switch has no effect within a transaction, and every statement that SQLAlchemy sends begins one.
        _set_foreign_keys(connection, on=False)
        try:
            with connection.begin():
                _upgrade(connection)
        finally:
            _set_foreign_keys(connection, on=True)


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
    config = _config()
    config.attributes["connection"] = connection
    found, newest = current_revision(connection), newest_revision()
    if found is None and inspect(connection).has_table(_UNREVISED_TABLE):
        command.stamp(config, _FIRST_REVISION)
        found = _FIRST_REVISION
    if found == newest:
        return
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise FailedPreconditionError(
            f"the database's tables have revision {found}, and this coordinator knows them up to {newest}; run the "
            "version that wrote them or a newer one, or give another database_url",
            reason="DATABASE_NEWER",
            field="database_url",
        )
    command.upgrade(config, "head")
    _check_references(connection)
    log.info("database upgraded", before=found, revision=newest)


def _set_foreign_keys(connection: Connection, *, on: bool) -> None:
    if connection.dialect.name == "sqlite" and connection.connection.dbapi_connection is not None:
        connection.connection.dbapi_connection.cursor().execute(f"PRAGMA foreign_keys={'ON' if on else 'OFF'}")


def _check_references(connection: Connection) -> None:
    if connection.dialect.name != "sqlite":
        return  # checked there all the time
    broken = connection.execute(text("PRAGMA foreign_key_check")).all()
    if broken:
        raise InternalError(f"bringing the tables up would break {len(broken)} references; nothing was changed")
