"""Pipelines have a place in the queue, and may have a time at which they end."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add both."""
    op.add_column("pipelines", sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("pipelines", sa.Column("deadline", sa.BigInteger()))
