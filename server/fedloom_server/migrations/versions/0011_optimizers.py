"""The server optimizer's state after each round."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Add the columns; empty says that there is no state."""
    for table in ("runs", "rounds"):
        op.add_column(table, sa.Column("optimizer_digest", sa.Text(), nullable=False, server_default=""))
        with op.batch_alter_table(table) as changed:
            changed.alter_column("optimizer_digest", server_default=None)
