"""What the store promises, on each database that it can stand on."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from fedloom_common.errors import NotFound, WrongState
from fedloom_server.config import KeepModels
from fedloom_server.database import open_database
from fedloom_server.ends import begin_again
from fedloom_server.records import Assignment, AssignmentState, Round, RoundState, Run, RunState, Work
from fedloom_server.references import names_to
from fedloom_server.retention import drop_old_models, trim_cache
from fedloom_server.store import Store


@pytest.fixture
def store(tmp_path: Path, database_url: str | None) -> Iterator[Store]:
    store = Store(tmp_path, open_database(database_url, tmp_path))
    yield store
    store.close()


def run_of(run_id: str, **changes: object) -> Run:
    facts = {
        "name": "tiny", "spec_json": "{}", "state": RunState.QUEUED, "submitted_at_s": 1.0,
        "assets": [{"name": "config.json", "digest": "blake3:aa", "size_bytes": 3}],
        "model_digest": "blake3:00", "model_bytes": 10,
    }  # fmt: skip
    return Run(id=run_id, **(facts | changes))


def round_of(number: int, **changes: object) -> Round:
    facts = {
        "run_id": "a1", "state": RoundState.TRAINING, "base_digest": "blake3:00", "started_at_s": 2.0,
    }  # fmt: skip
    return Round(number=number, **(facts | changes))


def assignment_of(site: str, **changes: object) -> Assignment:
    facts = {
        "id": f"a1.1.1.train.{site}", "run_id": "a1", "round": 1, "attempt": 1, "work": Work.TRAIN,
        "model_digest": "blake3:00", "model_bytes": 10,
    }  # fmt: skip
    return Assignment(site=site, **(facts | changes))


def test_records_come_back_as_they_were_saved(store):
    huge = 1 << 53
    saved = run_of("a1", model_bytes=huge, submitted_at_s=1_700_000_000.123456, name="naïve 漢字 🙂")
    record = round_of(1, cohort=["a", "b"], metrics={"loss": 0.1 + 0.2, "perplexity": float("inf")})
    assignment = assignment_of("a", examples=huge, tokens=huge, metrics={"loss": -1e-300}, is_folded=True)
    store.save(saved)
    store.save(record, assignment)
    read = store.run("a1")
    assert (read.name, read.model_bytes, read.submitted_at_s, read.assets) == (
        saved.name, huge, 1_700_000_000.123456, saved.assets,
    )  # fmt: skip
    (found,) = store.rounds("a1")
    assert (found.state, found.cohort, found.metrics) == (record.state, ["a", "b"], record.metrics)
    found = store.assignment(assignment.id)
    assert (found.examples, found.tokens, found.metrics, found.is_folded) == (
        huge,
        huge,
        {"loss": -1e-300},
        True,
    )
    assert found.state is AssignmentState.OPEN


def test_a_record_that_is_saved_again_takes_the_place_of_the_first(store):
    run = run_of("a1")
    store.save(run)
    run.state, run.rounds_done = RunState.RUNNING, 3
    store.save(run)
    store.save(run_of("a1", state=RunState.FINISHED, rounds_done=4))
    assert [(run.state, run.rounds_done) for run in store.runs()] == [(RunState.FINISHED, 4)]


def test_records_are_saved_all_or_none(store):
    store.save(run_of("a1"))
    with pytest.raises(Exception, match=r"(?i)foreign key"):
        store.save(run_of("a1", state=RunState.RUNNING), round_of(1, run_id="nobody"))
    assert store.run("a1").state is RunState.QUEUED


def test_what_is_there_of_many_records_is_asked_for_at_once(store):
    statements = []
    event.listen(store.database.engine, "before_cursor_execute", lambda *facts: statements.append(facts[2]))
    batch = [
        Assignment(
            id=f"r.1.1.train.s{number}", run_id="r", round=1, attempt=1, work=Work.TRAIN, site=f"s{number}",
            model_digest="blake3:00", model_bytes=10,
        )
        for number in range(1200)
    ]  # fmt: skip
    store.save(run_of("r"), *batch)
    batch[7].examples = 7
    store.save(run_of("r"), *batch)
    assert len(statements) < 50  # a question for each would make 2,400
    assert len(store.assignments("r")) == 1200
    assert sum(assignment.examples for assignment in store.assignments("r")) == 7


def test_what_each_round_asks_of_assignments_looks_only_at_those_it_is_about(tmp_path, spec):
    store, asked = Store(tmp_path), []
    run = run_of("a1", spec_json=spec().model_dump_json())
    store.save(run, round_of(1, model_digest="blake3:01"), assignment_of("a"))

    def note(connection, cursor, statement, parameters, context, many):
        asked.append((statement, parameters))

    event.listen(store.database.engine, "before_cursor_execute", note)
    names_to(store.database, "a", "blake3:ff")
    store.open_assignments()
    store.assignments("a1", 1)
    store.late("a1")
    store.clear_spool("a1")
    drop_old_models(store, run, KeepModels(last=1, best=0))
    event.remove(store.database.engine, "before_cursor_execute", note)
    queries = [(statement, parameters) for statement, parameters in asked if "assignments" in statement]
    assert len(queries) >= 10
    with store.database.connected() as connection:
        for statement, parameters in queries:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            steps = [step for *_, step in plan if "assignments" in step]
            assert steps, statement
            assert all("USING INDEX" in step or "USING COVERING INDEX" in step for step in steps), plan
    store.close()


def test_a_disk_without_a_limit_asks_the_database_for_nothing_when_it_is_trimmed(tmp_path):
    store, asked = Store(tmp_path), []
    event.listen(store.database.engine, "before_cursor_execute", lambda *told: asked.append(told))
    trim_cache(store)
    assert not asked
    store.close()


def test_norms_are_those_of_updates_that_counted_and_not_of_attempts_that_failed(store):
    done = {"state": AssignmentState.DONE}
    failed = [assignment_of(site, id=f"failed-{site}", update_norm=9.0, **done) for site in "ab"]
    counted = [
        assignment_of(site, id=f"counted-{site}", attempt=2, update_norm=norm, **done)
        for site, norm in (("a", 1.0), ("b", 2.0), ("c", 0.0))
    ]
    store.save(run_of("a1"), round_of(1, attempt=2), round_of(2), *failed, *counted)
    store.save(assignment_of("a", id="next", round=2, update_norm=5.0, **done))
    assert sorted(store.update_norms("a1", 1, 2)) == [1.0, 2.0]


def test_a_run_is_found_by_the_beginning_of_its_id(store):
    store.save(run_of("a1b2"), run_of("a1c3"), run_of("ff00"))
    assert store.run("ff").id == "ff00"
    with pytest.raises(WrongState, match="several runs begin with 'a1'"):
        store.run("a1")
    for prefix in ("", "b", "%", "_", "f%", "ff\0", "'; --"):
        with pytest.raises(NotFound):
            store.run(prefix)


def test_nul_characters_that_a_site_sends_are_shown_and_break_nothing(store):
    store.save(run_of("a1"))
    store.save(assignment_of("a", reason="ValueError: \0 in a path", metrics={"a\0b": 1.0}))
    (found,) = store.assignments("a1")
    assert found.reason == "ValueError: \N{REPLACEMENT CHARACTER} in a path"
    assert found.metrics == {"a\0b": 1.0}
    assert store.assignment("a1.1.1.train.a\0") is None


def test_runs_come_oldest_first_and_by_state(store):
    store.save(
        run_of("a1", submitted_at_s=3.0), run_of("b2", submitted_at_s=1.0, state=RunState.RUNNING),
        run_of("c3", submitted_at_s=2.0),
    )  # fmt: skip
    assert [run.id for run in store.runs()] == ["b2", "c3", "a1"]
    assert [run.id for run in store.runs(RunState.QUEUED)] == ["c3", "a1"]
    assert [run.id for run in store.runs(RunState.RUNNING, RunState.QUEUED)] == ["b2", "c3", "a1"]


def test_a_run_taken_up_again_begins_a_new_attempt(store):
    run = run_of("a1", state=RunState.STOPPED)
    store.save(run)
    store.save(
        round_of(1, state=RoundState.FINISHED),
        round_of(2, state=RoundState.FAILED, attempt=3, sum_digest="s"),
    )
    run.state = RunState.QUEUED
    begin_again(store, run)
    first, second = store.rounds("a1")
    assert first.state is RoundState.FINISHED
    assert (second.state, second.attempt, second.first_attempt) == (RoundState.TRAINING, 4, 4)
    assert second.sum_digest == ""


def test_the_spool_keeps_what_unfinished_rounds_count_on(store):
    store.save(run_of("a1"))
    store.save(round_of(1, attempt=2, sum_digest="blake3:5f"))
    kept = assignment_of("a", attempt=2)
    gone = [
        assignment_of("b", attempt=2, id="b", state=AssignmentState.LOST),
        assignment_of("c", attempt=1, id="c"),
        assignment_of("d", attempt=2, id="d", state=AssignmentState.DONE, is_folded=True),
    ]
    store.save(kept, *gone)
    paths = [store.spool.update_path(assignment) for assignment in (kept, *gone)]
    paths += [store.spool.sum_path("a1", "blake3:5f"), store.spool.sum_path("a1", "blake3:00")]
    for path in paths:
        path.write_bytes(b"x")
    store.clear_spool()
    assert sorted(store.spool.folder.iterdir()) == sorted([paths[0], paths[4]])


def test_a_file_is_synced_before_it_takes_its_name_in_the_store(tmp_path, monkeypatch):
    synced = []

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)

    store, path = Store(tmp_path / "state"), tmp_path / "model"
    path.write_bytes(b"model")
    monkeypatch.setattr(os, "fsync", note)
    stored = store.files.put(path)
    folder = tmp_path / "state" / "files"
    assert synced == [store.files.path(stored.digest).stat().st_ino, folder.stat().st_ino]
    store.close()
