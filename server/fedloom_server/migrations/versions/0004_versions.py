"""Trainings of asynchronous runs: which one of its site each is, and how stale."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns; the assignments that are there belong to rounds."""
    for name in ("turn", "staleness"):
        op.add_column("assignments", sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
