"""Alembic runs this for every command; ``schema`` gives it the connection."""

from alembic import context

from fedloom_server import federationrecords  # noqa: F401 (its tables join the others)
from fedloom_server.records import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite changes a column by copying its table
)
context.run_migrations()
