"""A database has a name, which the artifact store notes: only that database's coordinators may tidy the store up."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Choose a name."""
    table = op.create_table("database_identity", sa.Column("identity", sa.String(32), primary_key=True))
    op.bulk_insert(table, [{"identity": uuid.uuid4().hex}])
