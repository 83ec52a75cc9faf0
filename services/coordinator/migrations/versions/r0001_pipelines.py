"""Pipelines, their events and their worker jobs, as version 1 of the tables had them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    schema = op.create_table("coordinator_schema", sa.Column("version", sa.Integer(), primary_key=True))
    op.bulk_insert(schema, [{"version": 1}])
    op.create_table(
        "pipelines",
        sa.Column("pipeline_id", sa.String(64), primary_key=True),
        sa.Column("request_id", sa.String(128), unique=True),
        sa.Column("spec", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("executor_id", sa.String(128), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("progress", sa.LargeBinary()),
        sa.Column("failure", sa.LargeBinary()),
        sa.Column("results", sa.LargeBinary(), nullable=False),
        sa.Column("finished_stages", sa.Integer(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("start_time", sa.BigInteger()),
        sa.Column("end_time", sa.BigInteger()),
    )
    op.create_index("pipelines_newest", "pipelines", ["create_time", "pipeline_id"])
    op.create_index("pipelines_by_state", "pipelines", ["state", "create_time", "pipeline_id"])
    op.create_table(
        "pipeline_events",
        sa.Column(
            "pipeline_id", sa.String(64), sa.ForeignKey("pipelines.pipeline_id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("sequence", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("progress", sa.LargeBinary()),
        sa.Column("failure", sa.LargeBinary()),
    )
    op.create_table(
        "pipeline_jobs",
        sa.Column(
            "pipeline_id", sa.String(64), sa.ForeignKey("pipelines.pipeline_id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("job_id", sa.String(128), primary_key=True),
        sa.Column("worker", sa.String(32), nullable=False),
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
    )
