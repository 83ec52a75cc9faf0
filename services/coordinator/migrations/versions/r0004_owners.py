"""Pipelines have an owner, and it is known who may see which artifact."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column, its index and the table; pipelines from before belong to nobody, so administrators see them."""
    op.add_column("pipelines", sa.Column("owner", sa.String(300), nullable=False, server_default=""))
    op.create_index("pipelines_by_owner", "pipelines", ["owner", "create_time", "pipeline_id"])
    op.create_table(
        "artifact_grants",
        sa.Column("owner", sa.String(300), primary_key=True),
        sa.Column("digest", sa.String(71), primary_key=True),
        sa.Column("pipeline_id", sa.String(64), primary_key=True),
    )
    op.create_index("artifact_grants_by_pipeline", "artifact_grants", ["pipeline_id"])
