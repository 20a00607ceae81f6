"""Writing the domain's own rows: as they are now, whether the database has them already or not."""

from collections.abc import Sequence
from itertools import groupby

from sqlalchemy import inspect, select, tuple_
from sqlalchemy.orm import Session

from fedloom_server.records import Base

PART_ROWS = 500  # databases take some thousands of values in a statement


def write(session: Session, records: Sequence[Base]) -> None:
    """Write rows in a session's transaction; those that refer to others come after them.

    Neighbours of one kind are read at once: ``Session.merge`` alone asks the database for every row, and a
    round has an assignment for each of its sites.
    """
    for kind, group in groupby(records, key=type):
        rows = list(group)
        for begin in range(0, len(rows), PART_ROWS):
            _write_part(session, kind, rows[begin : begin + PART_ROWS])


def _write_part(session: Session, kind: type[Base], rows: Sequence[Base]) -> None:
    mapper = inspect(kind)
    keys = [mapper.primary_key_from_instance(row) for row in rows]
    query = select(kind).where(tuple_(*mapper.primary_key).in_(keys))
    there = {inspect(row).identity_key: row for row in session.scalars(query)}
    for row in rows:
        if inspect(row).transient and mapper.identity_key_from_instance(row) not in there:
            session.add(row)
        else:
            session.merge(row)
    session.flush()
