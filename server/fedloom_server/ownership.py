"""One coordinator a state: it owns its folder, and its database, while it runs.

A database on another host is owned twice over. A lock keeps a second coordinator from starting, but
it lives as long as the connection that took it, and the server may restart. So each owner also leaves
its mark in a row, and writes only while the mark is its own.
"""

import asyncio
import fcntl
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import ORMExecuteState, Session

from fedloom_common.errors import StorageUnavailable, WrongState
from fedloom_server.database import Database, open_database
from fedloom_server.federationrecords import Owner
from fedloom_server.objects import Objects
from fedloom_server.store import Store

LOCK_KEY = int.from_bytes(b"fedloom", "big")
TAKE_LOCK_S = 10.0  # the server may take a moment to see that a killed coordinator is gone
POLL_S = 0.2
CHECK_S = 5.0
IN_USE = "another coordinator uses the database; give each coordinator a database of its own"

logger = logging.getLogger(__name__)


@contextmanager
def owned_folder(state_dir: Path) -> Iterator[None]:
    """Own a state folder inside the block; a kill ends it too.

    Raises:
        WrongState: another coordinator does.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WrongState(
                f"another coordinator uses {state_dir}; give each a state_dir of its own"
            ) from error
        yield


@contextmanager
def owned_store(
    state_dir: Path,
    database_url: str | None,
    model_storage: str | None = None,
    model_cache_bytes: int | None = None,
) -> Iterator[tuple[Store, "Ownership"]]:
    """The store, owned inside the block.

    Raises:
        BadSpec: the URL of the database or of the storage is wrong.
        WrongState: another coordinator owns it, or its tables are of an unknown release.
        StorageUnavailable: the database does not answer.
    """
    with owned_folder(state_dir), owned_database(open_database(database_url, state_dir)) as ownership:
        objects = Objects(model_storage) if model_storage else None
        store = Store(state_dir, ownership.database, objects=objects, cache_bytes=model_cache_bytes)
        ownership.mark()
        try:
            yield store, ownership
        finally:
            store.files.close()


@contextmanager
def owned_database(database: Database) -> Iterator["Ownership"]:
    """Own a database inside the block, and close it.

    Raises:
        WrongState, StorageUnavailable: as for ``owned_store``.
    """
    ownership = Ownership(database)
    try:
        ownership.take()
        yield ownership
    finally:
        ownership.release()
        database.close()


class Ownership:
    """This coordinator's hold on its database; SQLite's file is owned with its folder."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._is_shared = database.engine.dialect.name != "sqlite"
        self._connection: Connection | None = None
        """Holds the lock."""
        self._mark = secrets.token_hex(8)

    def take(self) -> None:
        """Take the lock, before anything is read or written.

        Raises:
            WrongState: another coordinator holds it.
            StorageUnavailable: the database does not answer.
        """
        give_up_at_s = time.monotonic() + TAKE_LOCK_S
        while self._is_shared and not self._lock():
            if time.monotonic() > give_up_at_s:
                raise WrongState(IN_USE)
            time.sleep(POLL_S)

    def mark(self) -> None:
        """Leave the mark, once the tables are there; from now on only we write."""
        if self._is_shared:
            self.database.do(lambda session: session.merge(Owner(id=1, mark=self._mark)))
            event.listen(self.database.sessions, "before_flush", self._require_mark)
            event.listen(self.database.sessions, "do_orm_execute", self._require_mark_for)

    async def keep(self) -> None:
        """Watch the lock, and take it again when the server has restarted; ends only by an error.

        Raises:
            WrongState: another coordinator has taken the database over.
        """
        while True:
            await asyncio.sleep(CHECK_S)
            if self._is_shared:
                await asyncio.to_thread(self.check)

    @property
    def is_held(self) -> bool:
        """Whether the lock was ours when it was last checked."""
        return self._connection is not None

    def check(self) -> None:
        """Look whether the lock is still ours, and take it again if its connection was lost.

        Raises:
            WrongState: another coordinator has taken the database over.
        """
        try:
            if self._connection is None and self._lock():
                logger.warning("the database is held again")
            if self._connection is not None:
                self._connection.execute(text("SELECT 1"))
            is_ours = self.database.do(self._is_marked)
        except DBAPIError:
            logger.warning("the connection that holds the database is lost")
            self.release()
        except StorageUnavailable:
            pass  # whoever takes it meanwhile leaves a mark
        else:
            if not is_ours:
                raise WrongState("another coordinator has taken the database over; this one stops")

    def release(self) -> None:
        """Let another coordinator have the database."""
        if self._connection is not None:
            with suppress(DBAPIError):
                self._connection.close()
            self._connection = None

    def _lock(self) -> bool:
        """Try to take the lock, on a connection that is kept out of the pool."""
        with self.database.failures():
            connection = self.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            connection.detach()
            if connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": LOCK_KEY}).scalar():
                self._connection = connection
            else:
                connection.close()
        return self._connection is not None

    def _is_marked(self, session: Session) -> bool:
        """Whether the mark is ours; it stays so until the session's transaction ends."""
        return session.scalar(select(Owner.mark).with_for_update(read=True)) == self._mark

    def _require_mark(self, session: Session, *_: Any) -> None:
        if not self._is_marked(session):
            raise StorageUnavailable("another coordinator has taken the database over: connect to that one")

    def _require_mark_for(self, state: ORMExecuteState) -> None:
        if not state.is_select:
            self._require_mark(state.session)
