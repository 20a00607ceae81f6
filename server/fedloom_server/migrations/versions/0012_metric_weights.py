"""What lets metrics of sites be combined."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Add the columns; metrics from before are weighted by their names."""
    for name in ("metric_weights", "metric_counts"):
        op.add_column("assignments", sa.Column(name, sa.JSON(), nullable=False, server_default="{}"))
    with op.batch_alter_table("assignments") as changed:
        for name in ("metric_weights", "metric_counts"):
            changed.alter_column(name, server_default=None)
