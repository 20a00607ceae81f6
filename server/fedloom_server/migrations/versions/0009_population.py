"""Of how many sites a round's cohort was drawn."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the column; 0 says that it is not known."""
    op.add_column("rounds", sa.Column("population", sa.Integer(), nullable=False, server_default="0"))
    with op.batch_alter_table("rounds") as changed:
        changed.alter_column("population", server_default=None)
