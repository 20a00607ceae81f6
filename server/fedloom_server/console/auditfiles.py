"""The audit log where no coordinator is: exported files, databases, and heads that were noted."""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

from fedloom_common.errors import BadSpec
from fedloom_server.auditchain import Entry, Head

_FIELDS = {field.name: field.type for field in fields(Entry)}


def line_of(entry: Entry) -> str:
    """An entry as a line of an export."""
    return json.dumps(asdict(entry), ensure_ascii=False, separators=(",", ":"))


def file_entries(path: Path) -> Iterator[Entry]:
    """The entries of an export, in its order.

    Raises:
        BadSpec: the file cannot be read, or a line is no entry.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield _entry_of(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSpec(f"{path} cannot be read: {error}; give what `fedloom audit export` wrote") from error


def database_entries(database: str) -> Iterator[Entry]:
    """The entries in a coordinator's database, named by its file or URL; it is only read.

    Raises:
        BadSpec: it cannot be read, or has no audit log.
    """
    from sqlalchemy import create_engine, select  # here, so that the other commands start quickly
    from sqlalchemy.exc import SQLAlchemyError

    from fedloom_server.database import parse_url
    from fedloom_server.federationrecords import AuditRow

    if "://" not in database and not Path(database).is_file():
        raise BadSpec(f"there is no database {database}; wanted is the file coordinator.db, or a URL")
    url = database if "://" in database else f"sqlite:///file:{Path(database).absolute()}?mode=ro&uri=true"
    try:
        # As a coordinator reads it: for SQLAlchemy alone its driver may be another, which is not there.
        engine = create_engine(parse_url(url) if url.startswith("postgres") else url)
        with engine.connect() as connection:
            columns = [getattr(AuditRow, name) for name in _FIELDS]
            for row in connection.execute(select(*columns).order_by(AuditRow.seq)):
                yield Entry(**row._mapping)
        engine.dispose()
    except (SQLAlchemyError, ImportError) as error:
        cause = str(getattr(error, "orig", error)).splitlines()[0]
        raise BadSpec(f"the database holds no audit log that can be read: {cause}") from error


def read_head(path: Path) -> Head | None:
    """The head that an earlier check noted; None if there is no such file yet.

    Raises:
        BadSpec: the file is something else.
    """
    if not path.exists():
        return None
    try:
        seq, digest = path.read_text(encoding="utf-8").split()
        head = Head(int(seq), digest)
    except (OSError, ValueError) as error:
        raise BadSpec(
            f"{path} is no head of an audit log; wanted are a number and a hash, as `fedloom audit verify` "
            "prints them"
        ) from error
    return head


def _entry_of(line: str, place: str) -> Entry:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise BadSpec(f"{place}: not JSON ({error}); wanted is what `fedloom audit export` wrote") from error
    kinds = {name: int if name == "seq" else str for name in _FIELDS}
    if not isinstance(content, dict) or {n: type(v) for n, v in content.items()} != kinds:
        raise BadSpec(f"{place}: no entry of an audit log; wanted are {', '.join(_FIELDS)}")
    return Entry(**content)
