"""The way from SQLite to PostgreSQL: every row, copied once."""

from pathlib import Path

from sqlalchemy import Connection, Table, func, insert, select

from fedloom_common.errors import BadSpec, WrongState
from fedloom_server.database import SQLITE_FILE, Database, open_database
from fedloom_server.federationrecords import Owner
from fedloom_server.records import Base, Run
from fedloom_server.schema import upgrade

ROWS = 1000  # at a time


def copy_from_sqlite(state_dir: Path, target: Database) -> int:
    """Copy all rows of a state folder's own database into another, empty one; returns how many.

    Raises:
        BadSpec: the other one is no PostgreSQL, or the folder has no database.
        WrongState: the other one has runs already, or the folder's is of an unknown release.
    """
    if target.engine.dialect.name == "sqlite":
        raise BadSpec("--from-sqlite copies into PostgreSQL: set database to its URL")
    if not (state_dir / SQLITE_FILE).exists():
        raise BadSpec(f"there is no {state_dir / SQLITE_FILE} to copy from; is state_dir right?")
    source = open_database(None, state_dir)
    try:
        upgrade(source)
        upgrade(target)
        with source.connected() as reading, target.connected() as writing, writing.begin():
            if writing.scalar(select(func.count()).select_from(Run)):
                raise WrongState("the database has runs already; give an empty one")
            tables = [table for table in Base.metadata.sorted_tables if table is not Owner.__table__]
            return sum(_copy(table, reading, writing) for table in tables)
    finally:
        source.close()


def _copy(table: Table, reading: Connection, writing: Connection) -> int:
    copied = 0
    rows = reading.execute(select(table).order_by(*table.primary_key)).mappings()
    for part in rows.partitions(ROWS):
        writing.execute(insert(table), [dict(row) for row in part])
        copied += len(part)
    drawn = table.autoincrement_column
    if drawn is not None and copied:  # the database draws keys: it goes on after those that came
        sequence = func.pg_get_serial_sequence(table.name, drawn.name)
        writing.execute(select(func.setval(sequence, func.max(drawn))))
    return copied
