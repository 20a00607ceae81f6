"""The mark of the coordinator that may write."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "owner",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("mark", sa.Text(), nullable=False),
    )
