"""The database behind the store: SQLite in the state folder, or PostgreSQL by URL.

Nothing outside ``store`` and ``schema`` speaks SQL; nothing here knows a table.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.orm import Session, sessionmaker

from fedloom_common.errors import BadSpec, FederationError, StorageFull, StorageUnavailable

SQLITE_FILE = "coordinator.db"
TRIES = 2  # a connection may have been lost unseen; what fails twice is left to those who wait for it
REST_S = 1.0  # calls are made on the event loop: after a failure it must not wait for each of them
UNAVAILABLE = "the coordinator's database does not answer now: try again later"
POSTGRES_SETTINGS = {
    "connect_timeout": "3",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "options": "-c statement_timeout=10s -c lock_timeout=5s -c idle_in_transaction_session_timeout=60s",
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
        for tries_left in reversed(range(TRIES)):
            try:
                with self.sessions.begin() as session:
                    return work(session)
            except (DBAPIError, NoConnection) as error:
                if tries_left and _is_lost(error):
                    continue
                if (failure := self._failure(error)) is None:
                    raise
                raise failure from error
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """A connection for longer work, which is not done again.

        Raises:
            StorageUnavailable, StorageFull: as for ``do``.
        """
        try:
            with self.engine.connect() as connection:
                yield connection
        except (DBAPIError, NoConnection) as error:
            if (failure := self._failure(error)) is None:
                raise
            raise failure from error

    @property
    def is_missing(self) -> bool:
        """Whether it is a file that is not there: connecting would make it."""
        url = self.engine.url
        return url.drivername == "sqlite" and not Path(url.database or "").exists()

    def close(self) -> None:
        """Let the database go."""
        self.engine.dispose()

    def _failure(self, error: DBAPIError | NoConnection) -> FederationError | None:
        """What a failure means for those who called, or None if it is ours; details are for the log alone."""
        text = str(getattr(error, "orig", None) or error).strip()
        if _is_full(error, text):
            return StorageFull(f"no space left for the database: {text.splitlines()[0]}; free some")
        if isinstance(error, DBAPIError) and not _is_passing(error, text):
            return None
        self._resting_until_s = time.monotonic() + REST_S
        logger.warning("the database does not answer", extra={"url": shown(self.engine.url), "reason": text})
        return StorageUnavailable(UNAVAILABLE)


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


def _is_lost(error: DBAPIError | NoConnection) -> bool:
    return isinstance(error, DBAPIError) and error.connection_invalidated


def _is_full(error: DBAPIError | NoConnection, text: str) -> bool:
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state == "53100" or (isinstance(error, OperationalError) and "database or disk is full" in text)


def _is_passing(error: DBAPIError, text: str) -> bool:
    """Whether a failure is the database's own and not that of what was asked of it."""
    if error.connection_invalidated:
        return True
    if "psycopg" in type(error.orig).__module__:
        read_only = getattr(error.orig, "sqlstate", None) == "25006"  # a standby: its primary has moved
        return isinstance(error, OperationalError | InterfaceError) or (
            isinstance(error, InternalError) and read_only
        )
    return any(words in text for words in ("is locked", "disk I/O error", "unable to open database file"))
