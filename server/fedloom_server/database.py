"""The database behind the store: SQLite in the state folder, or PostgreSQL by URL.

Nothing outside ``store`` and ``schema`` speaks SQL; nothing here knows a table.
"""

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.orm import Session, sessionmaker

from fedloom_common.errors import BadSpec, FederationError, StorageFull, StorageUnavailable

SQLITE_FILE = "coordinator.db"
LEAST_REST_S = 0.5
RESTS = 3  # times as long as a failure took: calls are made on the event loop, which must not stand still
UNAVAILABLE = "the coordinator's database does not answer now: try again later"
PASSING_IN_SQLITE = ("is locked", "disk I/O error", "unable to open database file")
DAMAGED_SQLITE = ("file is not a database", "malformed")
DISK_FULL = "53100"
STANDBY = "25006"  # it takes no writes: its primary has moved
POSTGRES_SETTINGS = {
    "connect_timeout": "3",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "options": "-c statement_timeout=10s -c lock_timeout=5s -c idle_in_transaction_session_timeout=60s"
    " -c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3",
    "application_name": "fedloom coordinator",
}

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Database:
    """Short transactions on a database that may be away for a while."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sessions = sessionmaker(engine, expire_on_commit=False)
        self._resting_until_s = 0.0

    def do(self, work: Callable[[Session], T]) -> T:
        """Do some work in one transaction, once more if the connection is lost.

        A commit may succeed and its answer be lost: work must have the same effect when it is done twice.

        Raises:
            StorageUnavailable: the database does not answer, or not in time.
            StorageFull: its disk is full.
        """
        if time.monotonic() < self._resting_until_s:
            raise StorageUnavailable(UNAVAILABLE)
        with self.failures():
            try:
                with self.sessions.begin() as session:
                    return work(session)
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
            with self.sessions.begin() as session:  # a restart of the server breaks connections unseen
                return work(session)

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """A connection for longer work, which is not done again.

        Raises:
            StorageUnavailable, StorageFull: as for ``do``.
        """
        with self.failures(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turn the database's failures inside into ours, and rest after them.

        Raises:
            StorageUnavailable, StorageFull: as for ``do``.
            BadSpec: the file is damaged, or no database.
        """
        began_s = time.monotonic()
        try:
            yield
        except (DBAPIError, NoConnection) as error:
            kind = _meaning(error)
            if kind is None:
                raise
            text = _text(error)
            if kind is BadSpec:
                raise BadSpec(
                    f"{shown(self.engine.url)} is damaged, or no database ({text}); put a backup in its "
                    "place, or move it away with its -wal and -shm files to begin without any runs"
                ) from error
            logger.warning(
                "the database does not answer", extra={"url": shown(self.engine.url), "reason": text}
            )
            if kind is StorageFull:
                raise StorageFull(f"no space left for the database: {text}; free some") from error
            now_s = time.monotonic()
            self._resting_until_s = now_s + max(LEAST_REST_S, RESTS * (now_s - began_s))
            raise StorageUnavailable(UNAVAILABLE) from error

    @property
    def is_missing(self) -> bool:
        """Whether it is a file that is not there: connecting would make it."""
        url = self.engine.url
        return url.drivername == "sqlite" and not Path(url.database or "").exists()

    def close(self) -> None:
        """Let the database go."""
        self.engine.dispose()


def open_database(url: str | None, folder: Path) -> Database:
    """The database at a URL, or the SQLite file in a folder; nothing is read or written yet.

    Raises:
        BadSpec: the URL is not one, or its driver is not installed.
    """
    if url is None:
        engine = create_engine(f"sqlite:///{folder / SQLITE_FILE}")
        event.listen(engine, "connect", _make_durable)
        return Database(engine)
    parsed = parse_url(url)
    settings = {name: value for name, value in POSTGRES_SETTINGS.items() if name not in parsed.query}
    try:
        return Database(create_engine(parsed, connect_args=settings, pool_pre_ping=True, pool_timeout=5))
    except ModuleNotFoundError as error:
        raise BadSpec("PostgreSQL needs its driver: pip install 'fedloom[postgres]'") from error


def parse_url(url: str) -> URL:
    """A PostgreSQL URL, for our driver.

    Raises:
        BadSpec: it is none. Its text is left out: it may hold a password.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is None or parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise BadSpec(
            "database: wanted postgresql://USER:PASSWORD@HOST:PORT/NAME, or nothing for SQLite in state_dir"
        )
    return parsed.set(drivername="postgresql+psycopg")


def shown(url: URL) -> str:
    """A URL for people to read, without its password."""
    plain = url.set(query={name: value for name, value in url.query.items() if "password" not in name})
    return plain.render_as_string(hide_password=True)


def _make_durable(connection: Any, _: Any) -> None:
    """WAL lets readers go on while a writer writes; FULL makes each commit survive a power cut."""
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _meaning(error: DBAPIError | NoConnection) -> type[FederationError] | None:
    """What a failure means for those who called; None if it is ours, a wrong statement or value."""
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return StorageUnavailable
    state, text = getattr(error.orig, "sqlstate", None), _text(error)
    if state == DISK_FULL or "database or disk is full" in text:
        return StorageFull
    if isinstance(error.orig, sqlite3.Error):
        if any(words in text for words in DAMAGED_SQLITE):
            return BadSpec
        is_passing = any(words in text for words in PASSING_IN_SQLITE)
    else:
        is_passing = isinstance(error, OperationalError | InterfaceError) or state == STANDBY
    return StorageUnavailable if is_passing else None


def _text(error: DBAPIError | NoConnection) -> str:
    """What the driver says, in one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
