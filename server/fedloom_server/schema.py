"""Which tables a database has, and how it comes by those of this release."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from fedloom_common.errors import WrongState
from fedloom_server.database import Database

MIGRATIONS = Path(__file__).parent / "migrations"
FIRST_VERSION = 3  # PRAGMA user_version of the releases before migrations; their tables are those of 0001
ADOPTED = "0001"
VERSION_WITH_MIGRATIONS = 4  # those releases take only their own, and so leave ours alone

logger = logging.getLogger(__name__)


def latest_revision() -> str:
    """The tables that this release needs."""
    latest = _scripts().get_current_head()
    assert latest is not None, "there are migrations"
    return latest


def revision_of(connection: Connection) -> str | None:
    """The tables that a database has; None if it is new.

    Raises:
        WrongState: they are those of a release that this one does not know.
    """
    revision = MigrationContext.configure(connection).get_current_revision()
    if revision is None:
        return _revision_before_migrations(connection)
    known = [script.revision for script in _scripts().walk_revisions()]
    if revision not in known:
        raise WrongState(
            f"the database has tables of revision {revision}, this release of fedloom knows up to "
            f"{known[0]}: start the release that made them, or a newer one"
        )
    return revision


def upgrade(database: Database) -> None:
    """Bring a database to this release's tables, all or nothing; a new one is filled.

    Raises:
        WrongState: it has tables of a release that this one does not know.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with database.connected() as connection, _one_transaction(connection):
        before, latest = revision_of(connection), latest_revision()
        if before != latest:
            config = _config(connection)
            if before is not None:
                command.stamp(config, before)  # one of the releases before migrations has no stamp yet
            command.upgrade(config, latest)
            logger.info("database upgraded", extra={"revision_before": before, "revision": latest})


def require_latest(database: Database) -> None:
    """Check that a database has this release's tables.

    Raises:
        WrongState: it has not.
    """
    if database.is_missing:
        raise WrongState("there is no database yet: the coordinator makes it when it starts")
    with database.connected() as connection:
        revision, latest = revision_of(connection), latest_revision()
    if revision != latest:
        has = "is new" if revision is None else f"has tables of revision {revision}"
        raise WrongState(
            f"the database {has}, this release needs {latest}: back it up, then run "
            "`fedloom coordinator migrate`, or start the coordinator, which does the same"
        )


def _revision_before_migrations(connection: Connection) -> str | None:
    """What a database is whose tables no migration made."""
    tables = set(inspect(connection).get_table_names()) - {"alembic_version"}
    if not tables:
        return None
    version = 0
    if connection.dialect.name == "sqlite":
        version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if version == FIRST_VERSION and "runs" in tables:
        return ADOPTED
    raise WrongState(
        f"the database has tables ({', '.join(sorted(tables)[:5])}) of version {version}; wanted an empty "
        f"database, or tables of version {FIRST_VERSION} or later: start the release that made them, or give "
        "another state_dir or database"
    )


@contextmanager
def _one_transaction(connection: Connection) -> Iterator[None]:
    """The transaction that all steps share; SQLite's own driver would begin it after the first."""
    if connection.dialect.name != "sqlite":
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")  # large tables take their time
        yield
        connection.commit()
        return
    connection.exec_driver_sql("PRAGMA foreign_keys = OFF")  # tables are copied and dropped
    connection.commit()
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        if broken:
            raise WrongState(f"the database has rows that refer to nothing: {broken[:5]}; restore a backup")
        connection.exec_driver_sql(f"PRAGMA user_version = {VERSION_WITH_MIGRATIONS}")
        connection.commit()
    finally:
        connection.rollback()
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(MIGRATIONS))
