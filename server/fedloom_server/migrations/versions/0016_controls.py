"""What SCAFFOLD's control variates stand for."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    """Add the column; of earlier rounds nobody knows."""
    column: sa.Column[dict[str, int]] = sa.Column(
        "control_weights", sa.JSON(), nullable=False, server_default="{}"
    )
    op.add_column("rounds", column)
    with op.batch_alter_table("rounds") as changed:
        changed.alter_column("control_weights", server_default=None)
