"""The points of a run's series."""

import csv
import io

import pytest

from fedloom_common.errors import StorageUnavailable
from fedloom_server import metrics
from fedloom_server.console.connection import Operator
from fedloom_server.console.metrics import metrics as show_metrics
from fedloom_server.database import open_database
from fedloom_server.metrics import Samples, points_of
from fedloom_server.records import Assignment, AssignmentState, Round, RoundState, Run, RunState, Work
from fedloom_server.store import Store
from fedloom_server.watching import SiteProgress


@pytest.fixture
def store(tmp_path, database_url):
    store = Store(tmp_path, open_database(database_url, tmp_path))
    run = Run(
        id="a1", name="tiny", spec_json="{}", state=RunState.RUNNING, submitted_at_s=1.0, assets=[],
        model_digest="blake3:00", model_bytes=1,
    )  # fmt: skip
    store.save(run)
    yield store
    store.close()


def progress(site: str, done: int, loss: float | None) -> SiteProgress:
    return SiteProgress(
        site=site, round=2, work=Work.TRAIN, assignment_id=f"a1.2.1.train.{site}", phase="train", done=done,
        total=100, loss=loss, tokens_per_s=None,
    )  # fmt: skip


def written(store: Store) -> list[tuple[str, str, int, float]]:
    return [(point.site, point.name, point.step, point.value) for point in store.metric_points("a1")]


def test_each_training_is_looked_at_once_however_many_rounds_there_are(store, monkeypatch):
    looks = 0
    rounds = [
        Round(run_id="a1", number=number, state=RoundState.FINISHED, base_digest="", started_at_s=1.0)
        for number in range(1, 21)
    ]
    trainings = [
        Assignment(
            id=f"a1.{number}.1.train.a", run_id="a1", round=number, attempt=1, work=Work.TRAIN, site="a",
            model_digest="", model_bytes=1, state=AssignmentState.DONE, metrics={"loss": float(number)},
        )
        for number in range(1, 21)
    ]  # fmt: skip
    store.save(*rounds, *trainings)

    def base_round(assignment):
        nonlocal looks
        looks += 1
        return assignment.round - 1

    monkeypatch.setattr(Assignment, "base_round", property(base_round))
    points = list(points_of(store, store.run("a1")))
    assert [(point.round, point.name, point.value) for point in points] == [
        (number, "train_loss", float(number)) for number in range(1, 21)
    ]
    assert looks == 20


def test_what_a_site_measured_in_two_attempts_is_one_point(store):
    rounds = [
        Round(
            run_id="a1", number=n, state=RoundState.FINISHED, base_digest="", started_at_s=1.0, attempt=tries
        )
        for n, tries in ((0, 1), (1, 2))
    ]
    trainings = [
        Assignment(
            id=f"a1.1.{attempt}.train.a", run_id="a1", round=1, attempt=attempt, work=Work.TRAIN, site="a",
            model_digest="", model_bytes=1, state=AssignmentState.DONE, measures=True,
            base_measured={"examples": 1, "tokens": 1, "metrics": {"loss": 2.0 + attempt}},
        )
        for attempt in (1, 2)
    ]  # fmt: skip
    store.save(*rounds, *trainings)
    found = [(p.round, p.site, p.name, p.value) for p in points_of(store, store.run("a1"))]
    assert found == [(0, "a", "loss", 4.0)]


async def test_of_progress_the_latest_of_each_assignment_is_written_each_time(store):
    samples = Samples(store)
    for step in range(1, 1000):
        samples.note("a1", progress("a", step, 1 / step))
        samples.note("a1", progress("b", step, 2.0))
    assert written(store) == []
    await samples.flush()
    await samples.flush()
    assert written(store) == [("a", "step_loss", 999, 1 / 999), ("b", "step_loss", 999, 2.0)]


async def test_what_is_no_number_or_no_step_is_no_sample(store):
    samples = Samples(store)
    for name, loss in (("a", float("nan")), ("b", float("inf")), ("c", None)):
        samples.note("a1", progress(name, 5, loss))
    samples.note("a1", progress("d", 1 << 63, 1.0))
    await samples.flush()
    assert written(store) == []


async def test_a_long_run_is_sampled_less_often(store, monkeypatch):
    monkeypatch.setattr(metrics, "SLOWER_AFTER_POINTS", 10)
    samples = Samples(store)
    for step in range(1, 1001):
        samples.note("a1", progress("a", step, 1.0))
        await samples.flush()
    # 10 points at every flush, 10 at every second, then fourth … 64th: 10 * (1 + 2 + … + 32) = 630 flushes
    assert 60 <= len(written(store)) <= 70


async def test_samples_are_left_out_while_the_database_is_away(store, monkeypatch):
    def away(*records: object) -> None:
        raise StorageUnavailable("away")

    samples = Samples(store)
    samples.note("a1", progress("a", 1, 1.0))
    with monkeypatch.context() as patched:
        patched.setattr(store, "add", away)
        await samples.flush()
    samples.note("a1", progress("a", 2, 1.0))
    await samples.flush()
    assert written(store) == [("a", "step_loss", 2, 1.0)]


async def test_results_of_rounds_are_points_once_each(bench, spec):
    bench.site("a", examples=10)
    run = await bench.ended(await bench.enqueue(spec(rounds=2, evaluation={"initial": False})))
    points = list(points_of(bench.running.store, run))
    by_name = [(point.round, point.site, point.name, point.step) for point in points]
    assert len(by_name) == len(set(by_name))
    for number in (1, 2):
        for site in ("", "a"):
            assert (number, site, "train_loss", 0) in by_name
            assert (number, site, "loss", 0) in by_name
    (first, second) = [point.value for point in points if (point.site, point.name) == ("", "loss")]
    assert second == pytest.approx(first - 1.0)  # the fake site's loss is 10 - mean, and it adds 1 a round
    assert {point.value for point in points if point.name == "train_loss"} == {2.5}


async def test_the_command_prints_a_table_for_people_and_every_point_as_csv(bench, spec, capsys):
    bench.site("a")
    run = await bench.ended(await bench.enqueue(spec(rounds=1, evaluation={"initial": False})))
    operator = Operator(
        config=None, flags=("--coordinator", f"127.0.0.1:{bench.running.port}", "--insecure", "ann")
    )
    await show_metrics(operator, run.id)
    table = capsys.readouterr().out
    assert "train_loss" in table
    assert "2.5" in table
    await show_metrics(operator, run.id[:6], as_csv=True)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["value"] for row in rows if (row["site"], row["name"]) == ("a", "train_loss")] == ["2.5"]
    assert {row["round"] for row in rows} == {"1"}
