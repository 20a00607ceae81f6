"""The audit log: what is written, and what its chain tells."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from fedloom_common.errors import StorageUnavailable
from fedloom_server.audit import COORDINATOR, FULL_ENTRIES, AuditLog
from fedloom_server.auditchain import Entry, Head, Verification
from fedloom_server.records import Run, RunState
from fedloom_server.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


@pytest.fixture
def log(store: Store) -> AuditLog:
    return store.audit_log


def chain(log: AuditLog, count: int = 5) -> list[Entry]:
    for number in range(1, count + 1):
        log.audit("operator ann", "run.stop", f"run {number}", reason="enough")
    return log.entries()


def verified(entries: list[Entry], saved: Head | None = None) -> Verification:
    check = Verification(saved)
    check.follow(entries)
    check.end()
    return check


def test_a_chain_can_be_checked_with_nothing_but_sha256_and_json(log: AuditLog) -> None:
    log.audit("operator ann", "run.stop", 'a "run"', reason="naïve\nline\\")
    entry = log.entries()[0]
    hashed = (
        f'[1,"{entry.at}","operator ann","run.stop","a \\"run\\"",'
        '"{\\"reason\\":\\"na\\\\u00efve\\\\nline\\\\\\\\\\"}","' + "0" * 64 + '"]'
    )
    assert entry.hash == hashlib.sha256(hashed.encode()).hexdigest()
    assert json.loads(entry.details) == {"reason": "naïve\nline\\"}


def test_an_untouched_chain_is_right_to_its_head(log: AuditLog) -> None:
    check = verified(chain(log))
    assert (check.fault, check.head) == ("", log.head())
    assert check.head.seq == 5


CHANGES: dict[str, tuple[Callable[[list[Entry]], list[Entry]], int, str]] = {
    "an edited actor": (lambda e: [*e[:2], replace(e[2], actor="operator bob"), *e[3:]], 3, "changed"),
    "an edited subject": (lambda e: [*e[:2], replace(e[2], subject="run 33"), *e[3:]], 3, "changed"),
    "an edited time": (lambda e: [replace(e[0], at=e[1].at + "0"), *e[1:]], 1, "changed"),
    "edited details": (lambda e: [*e[:4], replace(e[4], details='{"reason":""}')], 5, "changed"),
    "a removed entry": (lambda e: [*e[:1], *e[2:]], 2, "missing"),
    "a removed first entry": (lambda e: e[1:], 1, "missing"),
    "two in another order": (lambda e: [e[0], e[2], e[1], *e[3:]], 2, "out of order"),
    "two that exchanged numbers": (
        lambda e: [e[0], replace(e[2], seq=2), replace(e[1], seq=3), *e[3:]],
        2,
        "does not follow",
    ),
    "a repeated entry": (lambda e: [*e[:2], e[1], *e[2:]], 3, "out of order"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_wrong_entry_is_named(change: str, log: AuditLog) -> None:
    make, seq, reason = CHANGES[change]
    check = verified(make(chain(log)))
    assert check.head.seq == seq - 1
    assert f"entry {seq} " in check.fault
    assert reason in check.fault


def test_entries_cut_off_at_the_end_show_against_a_head_that_was_noted(log: AuditLog) -> None:
    entries = chain(log)
    head = log.head()
    assert verified(entries[:3]).fault == ""  # the rest of the chain alone cannot tell
    assert "entries 4 to 5 have been removed" in verified(entries[:3], head).fault
    assert verified(entries, head).fault == ""


def test_a_chain_that_was_written_anew_shows_against_a_head_that_was_noted(
    log: AuditLog, tmp_path: Path
) -> None:
    chain(log)
    forged = Store(tmp_path / "forged")
    entries = chain(forged.audit_log, 9)
    assert verified(entries).fault == ""
    assert "entry 5 is not the one whose head was noted" in verified(entries, log.head()).fault
    forged.close()


def test_a_changed_row_in_the_database_shows(log: AuditLog, store: Store, tmp_path: Path) -> None:
    chain(log)
    engine = create_engine(f"sqlite:///{tmp_path / 'coordinator.db'}")
    with engine.begin() as connection:
        connection.execute(text("UPDATE audit SET subject = 'run 7' WHERE seq = 4"))
    engine.dispose()
    assert "entry 4 has been changed" in verified(log.entries()).fault


def test_the_chain_goes_on_after_a_restart(store: Store, tmp_path: Path) -> None:
    chain(store.audit_log, 2)
    store.close()
    again = Store(tmp_path)
    chain(again.audit_log, 2)
    assert verified(again.audit_log.entries()).head.seq == 4
    again.close()


def run_of(name: str) -> Run:
    return Run(
        id=name, name=name, spec_json="{}", state=RunState.QUEUED, submitted_at_s=1.0, assets=[],
        model_digest=f"blake3:{name}", model_bytes=1,
    )  # fmt: skip


def test_every_change_of_a_runs_state_is_an_entry_of_the_same_transaction(store: Store) -> None:
    first, second = run_of("a"), run_of("b")
    store.save(first, second)
    first.state = RunState.RUNNING
    store.save(first)
    first.reason = "waits for sites"
    store.save(first)  # no new state
    first.state, first.reason, first.rounds_done = RunState.STOPPED, "enough", 3
    store.save(first)
    entries = store.audit_log.entries()
    assert [(e.actor, e.action, e.subject) for e in entries] == [
        (COORDINATOR, "run.queued", "a"),
        (COORDINATOR, "run.queued", "b"),
        (COORDINATOR, "run.running", "a"),
        (COORDINATOR, "run.stopped", "a"),
    ]
    assert json.loads(entries[0].details)["spec_sha256"] == hashlib.sha256(b"{}").hexdigest()
    assert json.loads(entries[3].details) == {
        "name": "a", "reason": "enough", "rounds_done": 3, "model": "blake3:a",
    }  # fmt: skip
    assert verified(entries).fault == ""


def test_a_transaction_that_fails_leaves_no_entry(store: Store) -> None:
    broken = run_of("a")
    broken.name = None  # type: ignore[assignment]
    with pytest.raises(Exception, match="NOT NULL"):
        store.save(broken)
    assert store.audit_log.entries() == []


def test_what_a_peer_can_cause_at_will_is_counted_and_not_written(log: AuditLog) -> None:
    for _ in range(1000):
        log.audit_often("site mallory", "call.refused", "/fedloom.v1.RunService/Stop", reason="no")
    log.audit_often("site a", "call.refused", "/fedloom.v1.RunService/Stop")
    assert len(log.entries()) == FULL_ENTRIES + 1
    log.settle()
    assert len(log.entries()) == FULL_ENTRIES + 1  # the window is not over
    log.settle(at_end=True)
    last = log.entries()[-1]
    assert (last.actor, last.action) == ("site mallory", "call.refused")
    assert json.loads(last.details) == {"reason": "no", "more_of_the_same": 1000 - FULL_ENTRIES}
    assert len(log.entries()) == FULL_ENTRIES + 2


@pytest.mark.parametrize("value", ["nul\0", "x" * 100_000, "\ud800"])
def test_whatever_a_peer_says_is_stored_in_bounds(value: str, log: AuditLog) -> None:
    log.audit(value, value, value, reason=value, many=[value] * 10)
    entry = log.entries()[0]
    assert max(len(text) for text in (entry.actor, entry.subject, entry.details)) <= 4000
    assert verified([entry]).fault == ""


def test_writers_in_several_threads_make_one_chain(log: AuditLog) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: log.audit("site a", "x", str(number)), range(40)))
    assert verified(log.entries()).head.seq == 40


def test_what_waits_is_written_before_what_comes_after_it_and_many_in_one_transaction(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    transactions = []
    do = log._database.do
    monkeypatch.setattr(log._database, "do", lambda work: transactions.append(work) or do(work))
    for number in range(1000):
        log.audit_often(f"site s{number}", "session.began")
    log.audit("operator ann", "run.stop")
    assert len(transactions) == 1
    entries = log.entries(after=990, most=100)
    assert [entry.action for entry in entries] == ["session.began"] * 10 + ["run.stop"]
    assert verified([entry for page in (0, 500, 1000) for entry in log.entries(page)]).head.seq == 1001


def test_what_cannot_be_written_waits_and_what_an_operator_does_is_refused(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(work: object) -> None:
        raise StorageUnavailable("the database is away")

    with monkeypatch.context() as patch:
        patch.setattr(log._database, "do", away)
        log.audit_often("site a", "session.began")
        log.settle()
        with pytest.raises(StorageUnavailable):
            log.audit("operator ann", "run.stop")
    assert "the audit log cannot be written" in caplog.text
    assert [entry.action for entry in log.entries()] == ["session.began"]
