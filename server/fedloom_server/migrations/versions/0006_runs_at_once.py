"""Several runs at once: priorities, pauses, clones; late updates; what went wrong."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add columns, of which every row of an earlier release has the default, and a table."""
    _add("runs", "paused_at_s", sa.Double(), "0")
    _add("runs", "priority", sa.Integer(), "0")
    _add("runs", "cloned_from", sa.Text(), "")
    op.add_column("runs", sa.Column("cloned_round", sa.Integer()))
    _add("rounds", "target", sa.Integer(), "0")
    _add("assignments", "is_late", sa.Boolean(), sa.false())
    op.create_table(
        "failures",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("run_id", sa.Text(), sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("at_s", sa.Double(), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("log", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("work", sa.Text(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
    )
    op.create_index("ix_failures_run_id", "failures", ["run_id"])


def _add(table: str, name: str, kind: sa.types.TypeEngine[Any], default: str | sa.ColumnElement[Any]) -> None:
    op.add_column(table, sa.Column(name, kind, nullable=False, server_default=default))
    with op.batch_alter_table(table) as changed:
        changed.alter_column(name, server_default=None)
