"""The sites that are known, and what operators decided of them."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "sites",
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("own_labels", sa.JSON(), nullable=False),
        sa.Column("operator_labels", sa.JSON(), nullable=False),
        sa.Column("description", sa.JSON(), nullable=False),
        sa.Column("first_heard_s", sa.Double(), nullable=False),
        sa.Column("last_heard_s", sa.Double(), nullable=False),
    )
