"""Who may see which artifact: whoever uploaded it, and the owner of a pipeline that made it.

Artifacts are named by their content, so one may belong to several. Without a grant an artifact is not there: its owner
is whoever can show its content, by uploading it.
"""

from collections.abc import Iterator

from google.protobuf.message import Message
from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from granq.v1 import artifacts_pb2
from services.coordinator.database import read_session
from services.coordinator.tables import GrantRow

UPLOADED = ""
"""Stands for the pipeline where an artifact was uploaded."""


def digests_of(message: Message) -> Iterator[str]:
    """Yield the digests of all artifacts in a message."""
    if isinstance(message, artifacts_pb2.Artifact):
        yield message.digest
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            values = [item for item in value.values() if isinstance(item, Message)]
        else:
            values = list(value) if field.is_repeated else [value]
        for item in values:
            yield from digests_of(item)


def grant(session: Session, owner: str, pipeline_id: str, message: Message) -> None:
    """Let the owner of a pipeline see what it made; artifacts of nobody's pipelines need no grant."""
    if owner:
        for digest in set(digests_of(message)):
            session.merge(GrantRow(owner=owner, digest=digest, pipeline_id=pipeline_id))


def revoke(session: Session, pipeline_id: str) -> None:
    """Forget what a pipeline made."""
    session.execute(delete(GrantRow).where(GrantRow.pipeline_id == pipeline_id))


class Grants:
    """The stored grants.

    Args:
        engine: The coordinator's database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def uploaded(self, owner: str, artifact: artifacts_pb2.Artifact) -> None:
        """Let somebody see what he uploaded."""
        with Session(self._engine) as session, session.begin():
            grant(session, owner, UPLOADED, artifact)

    def holds(self, owner: str, digest: str) -> bool:
        """Return whether somebody may see an artifact."""
        query = select(GrantRow.digest).where(GrantRow.owner == owner, GrantRow.digest == digest).limit(1)
        with read_session(self._engine) as session:
            return session.scalars(query).first() is not None
