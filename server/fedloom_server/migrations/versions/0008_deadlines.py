"""When the work of a round was given out, so that its deadline holds across restarts."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add a column; 0 of rounds of an earlier release means that it is not known."""
    op.add_column("rounds", sa.Column("asked_at_s", sa.Double(), nullable=False, server_default="0"))
    with op.batch_alter_table("rounds") as changed:
        changed.alter_column("asked_at_s", server_default=None)
