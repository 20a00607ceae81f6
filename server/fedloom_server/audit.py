"""The audit log: who did what to what, as an append-only hash chain in the database.

Entries are never changed or removed by fedloom, and ``auditchain`` tells when somebody else did it.
"""

import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from sqlalchemy import event, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from fedloom_common.errors import FederationError
from fedloom_server.auditchain import Entry, Head, hash_of
from fedloom_server.database import Database
from fedloom_server.federationrecords import AuditRow
from fedloom_server.records import Run, RunState

COORDINATOR = "coordinator"
TEXT_CHARACTERS = 400
DETAILS_CHARACTERS = 4000
PAGE_ENTRIES = 500

MOST_PENDING = 10_000
WINDOW_S = 600.0
FULL_ENTRIES = 10
"""Of one actor and action in a window; of more, their number is told when the window ends."""

# Two writers must not both follow the same entry.
_LOCK = {
    "sqlite": "DELETE FROM audit WHERE seq < 0",  # deletes nothing, but is a write
    "postgresql": "LOCK TABLE audit IN SHARE ROW EXCLUSIVE MODE",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Told:
    """An entry to be."""

    actor: str
    action: str
    subject: str
    details: Mapping[str, Any]
    at: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass
class _Window:
    """What one actor did of one kind within a while."""

    began_s: float = field(default_factory=time.monotonic)
    written: int = 0
    counted: int = 0
    last: tuple[str, Mapping[str, Any]] = ("", {})


class AuditLog:
    """Appends to the chain. Calls are short transactions of a few milliseconds.

    Every change of a run's state is an entry too, written in the transaction that makes the change.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._windows: dict[tuple[str, str], _Window] = {}
        self._pending: list[_Told] = []
        self._is_failing = False
        self._lock = threading.Lock()
        event.listen(database.sessions, "before_flush", _audit_runs)

    def audit(self, actor: object, action: str, subject: str = "", **details: Any) -> None:
        """Add an entry; it is durable when this returns.

        ``actor`` is a Peer, or COORDINATOR for what it does by itself; ``action`` is like "run.stop".
        """
        with self._lock:
            told, self._pending = [*self._pending, _Told(str(actor), action, subject, details)], []
        try:
            self._database.do(lambda session: _append(session, told))
        except (SQLAlchemyError, FederationError):
            self._keep(told[:-1])
            raise

    def audit_often(self, actor: object, action: str, subject: str = "", **details: Any) -> None:
        """Add an entry of a kind that a peer can cause at will: it is counted, not written, if they are many.

        The first FULL_ENTRIES within WINDOW_S are written with the next entry or by ``settle``, all at once:
        a thousand sites may attach at once. ``settle`` tells the number of the others.
        """
        with self._lock:
            window = self._windows.setdefault((str(actor), action), _Window())
            is_full = window.written >= FULL_ENTRIES
            window.written += not is_full
            window.counted += is_full
            window.last = (subject, details)
            if not is_full:
                self._pending.append(_Told(str(actor), action, subject, details))

    def settle(self, *, at_end: bool = False) -> None:
        """Write what waits, and what was only counted in windows that are over; ``at_end``, in all of them.

        What cannot be written now waits on: an attach must not fail because the database is away.
        """
        with self._lock:
            over = {
                key: window
                for key, window in self._windows.items()
                if at_end or time.monotonic() - window.began_s >= WINDOW_S
            }
            for (actor, action), window in over.items():
                del self._windows[(actor, action)]
                if window.counted:
                    subject, details = window.last
                    counted = {**details, "more_of_the_same": window.counted}
                    self._pending.append(_Told(actor, action, subject, counted))
            told, self._pending = self._pending, []
        if not told:
            return
        try:
            self._database.do(lambda session: _append(session, told))
        except (SQLAlchemyError, FederationError) as error:
            self._keep(told)
            if not self._is_failing:
                logger.error("the audit log cannot be written; entries wait", extra={"error": str(error)})
            self._is_failing = True
        else:
            self._is_failing = False

    def _keep(self, told: list[_Told]) -> None:
        """Have entries wait on; of too many, the latest are lost."""
        with self._lock:
            self._pending = [*told, *self._pending][:MOST_PENDING]

    def entries(self, after: int = 0, most: int = PAGE_ENTRIES) -> list[Entry]:
        """Entries in order, from the one after ``after`` on; those that wait are written first."""
        self.settle()
        query = select(AuditRow).where(AuditRow.seq > after).order_by(AuditRow.seq).limit(most)
        return self._database.do(lambda session: [entry_of(row) for row in session.scalars(query)])

    def head(self) -> Head:
        """The end of the chain, after what waits."""
        self.settle()
        return self._database.do(_head)


def entry_of(row: AuditRow) -> Entry:
    """An entry as the chain's rules know it."""
    return Entry(
        seq=row.seq, at=row.at, actor=row.actor, action=row.action, subject=row.subject,
        details=row.details, previous=row.previous, hash=row.hash,
    )  # fmt: skip


def _append(session: Session, entries: Iterable[_Told]) -> None:
    """Add entries to the chain in the session's transaction, which no other writer's can then overtake."""
    session.execute(text(_LOCK[session.get_bind().dialect.name]))
    head = _head(session)
    for told in entries:
        content = {
            "at": told.at.isoformat(timespec="milliseconds"),
            "actor": _storable(told.actor),
            "action": _storable(told.action),
            "subject": _storable(told.subject),
            "details": _details_text(told.details),
            "previous": head.hash,
        }
        head = Head(head.seq + 1, hash_of(seq=head.seq + 1, **content))
        session.add(AuditRow(seq=head.seq, hash=head.hash, **content))


def _head(session: Session) -> Head:
    last = session.execute(select(AuditRow.seq, AuditRow.hash).order_by(AuditRow.seq.desc()).limit(1)).first()
    return Head(last.seq, last.hash) if last else Head()


def _audit_runs(session: Session, *_: Any) -> None:
    changed = [
        row
        for row in (*session.new, *session.dirty)
        if isinstance(row, Run) and inspect(row).attrs.state.history.has_changes()
    ]
    if changed:
        _append(session, [_Told(COORDINATOR, f"run.{run.state}", run.id, _facts(run)) for run in changed])


def _facts(run: Run) -> Mapping[str, Any]:
    facts = {"name": run.name, "rounds_done": run.rounds_done, "model": run.model_digest}
    spec = {"spec_sha256": sha256(run.spec_json.encode()).hexdigest()} if run.state is RunState.QUEUED else {}
    return facts | spec | ({"reason": run.reason} if run.reason else {})


def _storable(value: str) -> str:
    """Text that every database takes, at most TEXT_CHARACTERS of it."""
    text = value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    return text if len(text) <= TEXT_CHARACTERS else text[: TEXT_CHARACTERS - 2] + " …"


def _details_text(details: Mapping[str, Any]) -> str:
    cut = {name: _storable(value) if isinstance(value, str) else value for name, value in details.items()}
    text = json.dumps(cut, sort_keys=True, separators=(",", ":"), default=str)
    if len(text) <= DETAILS_CHARACTERS:
        return text
    return json.dumps({"cut": text[: DETAILS_CHARACTERS // 2]}, separators=(",", ":"))
