"""Coordinators that know no revisions are turned away: they would work on tables that they do not understand.

They read the version in `coordinator_schema`, and refuse all but 1. From here on the revision is what counts.
"""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Write a version that no such coordinator takes."""
    op.execute("DELETE FROM coordinator_schema")
    op.execute("INSERT INTO coordinator_schema (version) VALUES (2)")
