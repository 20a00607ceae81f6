import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text
from typer.testing import CliRunner

from fedloom_common.errors import NotFound, WrongState
from fedloom_server.cli import app
from fedloom_server.database import SQLITE_FILE, open_database
from fedloom_server.federationrecords import MetricPoint
from fedloom_server.moving import copy_from_sqlite
from fedloom_server.records import Base, RoundState, RunState
from fedloom_server.schema import latest_revision, require_latest, revision_of, upgrade
from fedloom_server.store import Store

BEFORE_MIGRATIONS = Path(__file__).with_name("before_migrations.sql")
"""Tables and rows that the last release without migrations wrote."""


@pytest.fixture
def database(tmp_path, database_url):
    database = open_database(database_url, tmp_path)
    yield database
    database.close()


def old_state(folder: Path, version: int = 3) -> None:
    folder.mkdir()
    with sqlite3.connect(folder / SQLITE_FILE) as connection:
        connection.executescript(BEFORE_MIGRATIONS.read_text())
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()


def test_migrations_make_the_tables_of_the_records(database):
    upgrade(database)
    with database.connected() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_an_upgrade_of_the_latest_changes_nothing(database):
    upgrade(database)
    require_latest(database)
    upgrade(database)
    with database.connected() as connection:
        assert revision_of(connection) == latest_revision()


def test_a_new_database_is_told_from_one_of_this_release(database):
    with pytest.raises(WrongState, match=r"there is no database yet|the database is new"):
        require_latest(database)


def test_rows_of_a_release_before_migrations_survive_every_migration(tmp_path):
    folder = tmp_path / "state"
    old_state(folder)
    store = Store(folder)
    run = store.run("5c1f")
    assert (run.name, run.state, run.model_bytes) == ("shakespeare", RunState.RUNNING, 5_000_000_000)
    assert run.assets == [{"name": "config.json", "digest": "blake3:aa", "size_bytes": 9}]
    finished, training = store.rounds("5c1f")
    assert finished.metrics == {"loss": 2.25, "perplexity": float("inf")}
    assert (training.state, training.cohort) == (RoundState.TRAINING, ["a", "b"])
    (assignment,) = store.assignments("5c1f")
    assert (assignment.examples, assignment.has_spooled_update) == (1 << 40, True)
    store.save(run, finished, training, assignment)
    store.close()
    with sqlite3.connect(folder / SQLITE_FILE) as connection:
        # The releases before migrations take version 3 for their own, and would write to it.
        assert connection.execute("PRAGMA user_version").fetchone() == (4,)
    connection.close()


@pytest.mark.parametrize("version", [0, 2, 99])
def test_tables_of_an_unknown_release_are_refused_and_left_as_they_are(tmp_path, version):
    old_state(tmp_path / "state", version)
    before = (tmp_path / "state" / SQLITE_FILE).read_bytes()
    with pytest.raises(WrongState, match=f"of version {version}.*start the release that made them"):
        Store(tmp_path / "state")
    assert (tmp_path / "state" / SQLITE_FILE).read_bytes()[100:] == before[100:]  # a header counts openings


def test_a_newer_revision_is_refused(database):
    upgrade(database)
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(WrongState, match="tables of revision 9999"):
        upgrade(database)


def test_a_foreign_database_is_refused(database):
    with database.engine.begin() as connection:
        connection.execute(text("CREATE TABLE accounts (id INTEGER)"))
    with pytest.raises(WrongState, match=r"has tables \(accounts\)"):
        upgrade(database)


def test_a_migration_that_fails_leaves_the_database_as_it_was(database, monkeypatch):
    make, made = Operations.create_table, []

    def fail_at_last(self, name, *columns, **options):
        made.append(name)
        if name == "assignments":
            raise RuntimeError("killed")
        return make(self, name, *columns, **options)

    monkeypatch.setattr(Operations, "create_table", fail_at_last)
    with pytest.raises(RuntimeError, match="killed"):
        upgrade(database)
    assert made[:2] == ["runs", "rounds"]
    with database.connected() as connection:
        assert inspect(connection).get_table_names() == []


def test_every_row_moves_from_sqlite_to_postgresql(tmp_path, postgres):
    folder, url = tmp_path / "state", postgres.new_database()
    old_state(folder)
    before = Store(folder)
    before.audit_log.audit("operator ann", "run.stop", "5c1f")
    before.add(
        *(
            MetricPoint(run_id="5c1f", round=2, site="a", name="step_loss", step=step, value=0.5, at_s=1.0)
            for step in range(3)
        )
    )
    target = open_database(url, folder)
    # 1 run, 2 rounds, 1 assignment, 1 audit entry, 3 samples
    assert copy_from_sqlite(folder, target) == 8
    after = Store(folder, target)
    assert [vars_of(record) for record in after.rounds("5c1f")] == [
        vars_of(record) for record in before.rounds("5c1f")
    ]
    assert vars_of(after.run("5c1f")) == vars_of(before.run("5c1f"))
    assert after.audit_log.head() == before.audit_log.head()
    after.add(MetricPoint(run_id="5c1f", round=2, site="a", name="step_loss", step=9, value=0.5, at_s=1.0))
    assert [point.step for point in after.metric_points("5c1f")] == [0, 1, 2, 9]
    with pytest.raises(WrongState, match="has runs already"):
        copy_from_sqlite(folder, target)
    before.close()
    after.close()


def vars_of(record: Base) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if not name.startswith("_")}


def test_migrating_what_is_not_there_makes_no_database_and_says_where_it_looked(tmp_path):
    arguments = ["migrate", "--state-dir", str(tmp_path / "state"), "--insecure"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, NotFound)
    assert f"there is no {tmp_path / 'state' / 'coordinator.db'} to migrate" in str(result.exception)
    assert not (tmp_path / "state").exists()
    old_state(tmp_path / "state")
    assert "revision" in CliRunner().invoke(app, arguments).stdout
