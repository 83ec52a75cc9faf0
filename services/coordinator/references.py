"""What the pipelines of a database refer to in the artifact store."""

import hashlib
import re
from collections.abc import Callable, Iterable

from sqlalchemy import Engine, delete, select, text
from sqlalchemy.orm import Session

from services.coordinator.database import read_session
from services.coordinator.grants import UPLOADED
from services.coordinator.tables import GrantRow, IdentityRow, PipelineRow
from services.coordinator.transitions import ENDED, now_us

_DIGEST = re.compile(rb"sha256:[0-9a-f]{64}")
_KEY = int.from_bytes(hashlib.sha256(b"granq.artifacts").digest()[:8], signed=True)
_PAGE = 500


def digests_in(data: bytes) -> set[str]:
    """Return every digest that stands in some bytes: also in fields that only a later version knows."""
    return {found.decode() for found in _DIGEST.findall(data)}


def while_artifacts_stay(session: Session) -> None:
    """Keep artifacts from being removed until the transaction ends; of those who call this, many may do so at once."""
    _lock(session, "pg_advisory_xact_lock_shared")


def _lock(session: Session, function: str) -> None:
    # On SQLite a writing transaction excludes every other one anyhow.
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text(f"SELECT {function}(:key)"), {"key": _KEY})


class References:
    """Digests that stored pipelines name, in their specs and results.

    Args:
        engine: The coordinator's database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def identity(self) -> str:
        """Return the name of this database."""
        with read_session(self._engine) as session:
            return session.scalars(select(IdentityRow.identity)).one()

    def states(self) -> dict[str, int]:
        """Return the state of every pipeline."""
        with read_session(self._engine) as session:
            return {row[0]: row[1] for row in session.execute(select(PipelineRow.pipeline_id, PipelineRow.state))}

    def digests(self) -> set[str]:
        """Return what all pipelines refer to."""
        found: set[str] = set()
        after = ""
        columns = (PipelineRow.pipeline_id, PipelineRow.spec, PipelineRow.results)
        while True:
            query = select(*columns).where(PipelineRow.pipeline_id > after).order_by(PipelineRow.pipeline_id)
            with read_session(self._engine) as session:
                rows = session.execute(query.limit(_PAGE)).all()
            for row in rows:
                found |= digests_in(row.spec) | digests_in(row.results)
            if len(rows) < _PAGE:
                return found
            after = rows[-1].pipeline_id

    def ended_before(self, time_us: int, limit: int) -> list[str]:
        """Return pipelines that ended before a time, oldest first."""
        query = select(PipelineRow.pipeline_id).where(PipelineRow.state.in_(ENDED), PipelineRow.end_time < time_us)
        with read_session(self._engine) as session:
            return list(session.scalars(query.order_by(PipelineRow.end_time).limit(limit)))

    def unless_named(self, digests: Iterable[str], since_us: int, remove: Callable[[str], int | None]) -> int:
        """Call a function for each digest that no pipeline submitted since a time names; return the sum.

        The function returns the bytes that it freed, or None where the artifact stays.

        No pipeline is submitted meanwhile: one that is, afterwards, finds that its model is gone, and is refused.
        """
        with Session(self._engine) as session, session.begin():
            _lock(session, "pg_advisory_xact_lock")
            named: set[str] = set()
            for spec in session.scalars(select(PipelineRow.spec).where(PipelineRow.create_time >= since_us)):
                named |= digests_in(spec)
            removed = 0
            for digest in set(digests) - named:
                size = remove(digest)
                if size is not None:
                    removed += size
                    # Whoever uploaded it may do so again; what pipelines made is forgotten with them.
                    uploads = GrantRow.pipeline_id == UPLOADED
                    session.execute(delete(GrantRow).where(GrantRow.digest == digest, uploads))
            return removed


def seconds_ago(seconds: float) -> int:
    """Return a time in microseconds since the epoch."""
    return now_us() - int(seconds * 1e6)
