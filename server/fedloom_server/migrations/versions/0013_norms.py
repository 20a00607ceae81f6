"""How far each update moved its model."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Add the column; 0 says that nobody measured it."""
    op.add_column("assignments", sa.Column("update_norm", sa.Double(), nullable=False, server_default="0"))
    with op.batch_alter_table("assignments") as changed:
        changed.alter_column("update_norm", server_default=None)
