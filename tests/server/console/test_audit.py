"""The audit log at the operator's end."""

import json
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from fedloom.v1.audit_pb2 import AuditEntry
from fedloom_common.errors import BadSpec
from fedloom_server.database import open_database
from fedloom_server.store import Store


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of a coordinator with eight entries."""
    folder = tmp_path_factory.mktemp("state")
    store = Store(folder)
    for number in range(1, 8):
        store.audit_log.audit("operator ann", "run.stop", f"run{number}", reason="enough")
    store.audit_log.audit("site \x1b[31mred", "call.refused", "/x")
    store.close()
    return folder


@pytest.fixture(autouse=True)
def entries(folder: Path, fake) -> list[AuditEntry]:
    store = Store(folder)
    fake.audit = [AuditEntry(**vars(entry)) for entry in store.audit_log.entries()]
    store.close()
    return fake.audit


def test_the_newest_entries_are_shown_oldest_first(console) -> None:
    shown = console("audit", "list", "--last", "2").stdout.splitlines()
    assert [line.split()[0] for line in shown] == ["entry", "7", "8"]
    assert "operator ann" in shown[1]
    assert "reason enough" in shown[1]
    assert "\x1b" not in "".join(shown)
    told = json.loads(console("audit", "list", "--json", "--action", "run.").stdout)
    assert [entry["seq"] for entry in told] == list(range(1, 8))
    assert told[0]["details"] == {"reason": "enough"}


def test_an_unbroken_log_is_verified_over_the_connection_and_its_head_kept(console, entries) -> None:
    first = console("audit", "verify", "--head", "head")
    assert f"8 entries, unbroken; head 8 {entries[-1].hash}" in first.stdout
    assert Path("head").read_text() == f"8 {entries[-1].hash}\n"
    del entries[-3:]
    assert "5 entries, unbroken" in console("audit", "verify").stdout
    cut = console("audit", "verify", "--head", "head", status=1)
    assert "BROKEN: the chain ends at entry 5" in cut.stdout


def test_a_changed_entry_is_named_and_the_noted_head_stays(console, entries) -> None:
    entries[3].subject = "run9"
    Path("head").write_text(f"2 {entries[1].hash}\n")
    told = console("audit", "verify", "--head", "head", status=1).stdout
    assert "BROKEN: entry 4 has been changed" in told
    assert "3 entries before it are as they were written" in told
    assert Path("head").read_text() == f"2 {entries[1].hash}\n"


def test_an_export_is_verified_offline(console) -> None:
    console("audit", "export", "--to", "log.jsonl")
    lines = Path("log.jsonl").read_text().splitlines()
    assert console("audit", "export").stdout.splitlines() == lines
    assert "8 entries, unbroken" in console("audit", "verify", "--file", "log.jsonl").stdout
    Path("log.jsonl").write_text("\n".join([*lines[:4], *lines[5:]]) + "\n")
    told = console("audit", "verify", "--file", "log.jsonl", status=1).stdout
    assert "entry 5 is missing or out of order: entry 6 came" in told


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_a_postgresql_database_is_verified_by_the_url_that_the_config_has(
    console, postgres, tmp_path: Path, scheme: str
) -> None:
    url = postgres.new_database().replace("postgresql", scheme, 1)
    store = Store(tmp_path / "state", open_database(url, tmp_path))
    for number in range(3):
        store.audit_log.audit("operator ann", "run.stop", f"run{number}")
    store.close()
    assert "3 entries, unbroken" in console("audit", "verify", "--database", url).stdout


def test_a_database_is_verified_offline_and_only_read(console, folder: Path) -> None:
    database = folder / "coordinator.db"
    assert "8 entries, unbroken" in console("audit", "verify", "--database", str(database)).stdout
    engine = create_engine(f"sqlite:///{database}")
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM audit WHERE seq = 2"))
    engine.dispose()
    told = console("audit", "verify", "--database", f"sqlite:///{database}", status=1).stdout
    assert "entry 2 is missing" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--file", "none"), "none cannot be read"),
        (("--file", "words"), "words, line 1: not JSON"),
        (("--file", "numbers"), "numbers, line 1: no entry of an audit log; wanted are seq, at"),
        (("--database", "none"), "there is no database none"),
        (("--database", "words"), "the database holds no audit log that can be read"),
        (("--database", "odd://x"), "the database holds no audit log that can be read"),
        (("--head", "words"), "words is no head of an audit log"),
        (("--file", "numbers", "--database", "words"), "--file and --database are both given"),
    ],
)
def test_files_that_are_no_log_are_named(arguments: tuple[str, ...], message: str, console) -> None:
    Path("words").write_text("some words\n")
    Path("numbers").write_text('{"seq": 1}\n')
    with pytest.raises(BadSpec, match=message):
        console("audit", "verify", *arguments)
