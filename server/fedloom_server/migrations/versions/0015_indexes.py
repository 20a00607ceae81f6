"""Indexes of what is asked of assignments all the time."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    """Make them; the one on run_id and round takes the place of the one on run_id."""
    op.create_index("ix_assignments_run_id_round", "assignments", ["run_id", "round"])
    op.drop_index("ix_assignments_run_id", "assignments")
    op.create_index("ix_assignments_site_run_id", "assignments", ["site", "run_id"])
    for name, sqlite, postgresql in (
        ("open", "state = 'OPEN'", "state = 'OPEN'"),
        ("late", "is_late = 1", "is_late"),
    ):
        op.create_index(
            f"ix_assignments_{name}", "assignments", ["run_id", "round"],
            sqlite_where=sa.text(sqlite), postgresql_where=sa.text(postgresql),
        )  # fmt: skip
