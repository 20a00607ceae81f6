"""What sites measured of the models that they trained from, and trainings alone."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Add the columns; the trainings that are there measured nothing."""
    columns: tuple[sa.Column[Any], ...] = (
        sa.Column("measures", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("base_measured", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("data_examples", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("alone_rounds", sa.Integer(), nullable=False, server_default="0"),
    )
    for column in columns:
        op.add_column("assignments", column)
