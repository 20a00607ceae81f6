"""Adapters: the files that make a model of one."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add a column to runs and to rounds; those of an earlier release trained whole models."""
    for table in ("runs", "rounds"):
        op.add_column(table, sa.Column("adapter", sa.JSON(), nullable=False, server_default="{}"))
        with op.batch_alter_table(table) as changed:
            changed.alter_column("adapter", server_default=None)
