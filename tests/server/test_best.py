"""Which model is the best, which one a run ends with, and that it is still there."""

import math

import pytest
from safetensors.numpy import load_file

from fedloom_common.errors import NotFound
from fedloom_server.app import coordinator
from fedloom_server.best import best_of, final_round, ranked
from fedloom_server.config import KeepModels
from fedloom_server.exports import export
from fedloom_server.records import Run, RunState
from fedloom_server.stopping import RoundResult


def history(*values, metric="loss"):
    """From round 0; None is a model that nobody measured."""
    metrics = [{} if value is None else {metric: value} for value in values]
    return [RoundResult(number=number, metrics=found) for number, found in enumerate(metrics)]


@pytest.mark.parametrize(
    ("changes", "metric", "expected"),
    [
        pytest.param({}, "loss", [2, 4, 0], id="the-loss-of-nothing-else-is-asked-for"),
        pytest.param({"stop": {"target": {"metric": "accuracy", "value": 9, "higher_is_better": True}}},
                     "accuracy", [0, 2, 4], id="what-stops-the-run"),
        pytest.param({"stop": {"patience": {"metric": "bits", "evaluations": 2}}}, "bits", [2, 4, 0],
                     id="what-runs-out-of-patience"),
        pytest.param({"stop": {"patience": {"metric": "loss", "evaluations": 2}},
                      "evaluation": {"best": {"metric": "f1", "higher_is_better": True}}},
                     "f1", [0, 2, 4], id="what-is-asked-for"),
    ],
)  # fmt: skip
def test_models_are_ranked_by_the_metric_that_the_spec_names(spec, changes, metric, expected):
    known = history(5.0, None, 3.0, math.nan, 3.0, metric=metric)
    assert [result.number for result in ranked(spec(**changes), known)] == expected


def test_no_model_is_the_best_before_one_is_measured(spec):
    assert best_of(spec(), history(None, math.inf)) is None


@pytest.mark.parametrize(
    ("stop", "state", "expected"),
    [
        pytest.param({"patience": {"evaluations": 1}}, RunState.FINISHED, 1, id="the-best-is-restored"),
        pytest.param({"patience": {"evaluations": 1}}, RunState.STOPPED, 3, id="not-of-a-stopped-run"),
        pytest.param({"patience": {"evaluations": 1}}, RunState.RUNNING, 3, id="not-of-one-under-way"),
        pytest.param({"patience": {"evaluations": 1, "restore_best": False}}, RunState.FINISHED, 3,
                     id="not-if-it-is-not-wanted"),
        pytest.param({"target": {"value": 0.1}}, RunState.FINISHED, 3, id="not-without-patience"),
    ],
)  # fmt: skip
def test_the_final_model(spec, stop, state, expected):
    run = Run(
        id="a1", name="tiny", spec_json=spec(stop=stop).model_dump_json(), state=state, submitted_at_s=1.0,
        assets=[], model_digest="", model_bytes=0, rounds_done=3,
    )  # fmt: skip
    assert final_round(run, history(5.0, 2.0, 3.0, 4.0)) == expected


@pytest.mark.parametrize("when", ["before_training", "after_round"])
async def test_a_run_out_of_patience_keeps_and_exports_its_best_model(config, bench_of, spec, when, initial):
    config = config.model_copy(update={"keep_models": KeepModels(last=1, best=0)})
    async with coordinator(config) as running:
        bench = bench_of(running)
        site = bench.site("a", step=1.0)
        by_round = {0: 5.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 4.5}
        start = float(initial["layer.bias"].mean())
        site.measure = lambda tensors: by_round[round(float(tensors["layer.bias"].mean()) - start)]
        wanted = spec(rounds=50, stop={"patience": {"evaluations": 2}}, evaluation={"when": when})
        run = await bench.ended(await bench.enqueue(wanted))
        assert run.state == "finished"
        assert run.rounds_done == (3 if when == "after_round" else 4)
        exported, best = export(running.store, run.id, None), export(running.store, run.id, "best")
        assert exported.round == best.round == 1
        assert exported.files[0]["digest"] == best.files[0]["digest"]
        model = load_file(running.store.files.path(exported.files[0]["digest"]))
        assert model["layer.bias"].mean() == pytest.approx(start + 1, abs=1e-5)
        assert "this is its best model by loss, that of round 1" in exported.card.replace("\\", "")
        assert "| a | 1 | 10 | 80 | 2.0000 | 7.3891 |" in exported.card  # of this model, not of its base
        assert export(running.store, run.id, run.rounds_done).round == run.rounds_done


async def test_a_run_without_a_measured_model_has_no_best_one(bench, spec):
    bench.site("a")
    wanted = spec(evaluation={"every_rounds": 0, "initial": False})
    run = await bench.ended(await bench.enqueue(wanted))
    with pytest.raises(NotFound, match="is measured by loss yet"):
        export(bench.running.store, run.id, "best")
    assert export(bench.running.store, run.id, None).round == 1


async def test_an_export_looks_at_the_assignments_no_more_often_the_more_sites_there_are(
    bench, spec, monkeypatch
):
    class Watched(list):
        looks = 0

        def __iter__(self):
            Watched.looks += 1
            return super().__iter__()

    for name in "abcdefgh":
        bench.site(name)
    run = await bench.ended(await bench.enqueue(spec(cohort={"min_sites": 8})))
    store = bench.running.store
    everything = Watched(store.assignments(run.id))
    monkeypatch.setattr(store, "assignments", lambda run_id: everything)
    card = export(store, run.id, None).card
    assert all(f"| {name} | 1 | 10 |" in card for name in "abcdefgh")
    assert Watched.looks <= 2
