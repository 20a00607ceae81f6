"""What a site would have without the federation (evaluation.alone), and the report of it."""

import asyncio

import numpy as np
import pytest

from fedloom_common.runspec import Goal
from fedloom_server.app import coordinator
from fedloom_server.closing import train_alone
from fedloom_server.console.report import goal_of, report_data, site_reports
from fedloom_server.models import MODEL_FILE
from fedloom_server.records import Assignment, Round
from fedloom_server.rpc.messages import round_message, run_message

ALONE = {"when": "before_training", "alone": True}


def told(running, run):
    """The run and its rounds as messages."""
    store = running.store
    run, assignments = store.run(run.id), store.assignments(run.id)
    rounds = [
        round_message(record, [a for a in assignments if a.round == record.number], MODEL_FILE)
        for record in store.rounds(run.id)
    ]
    return run_message(run, store.history(run.id), MODEL_FILE), rounds


def reports(running, run, goal=None):
    message, rounds = told(running, run)
    return {report.site: report for report in site_reports(message, rounds, goal or goal_of(message))}


def alone(bench, run):
    return {a.site: a for a in bench.running.store.assignments(run.id) if a.work == "alone"}


async def test_each_site_trains_alone_for_as_many_rounds_as_counted_and_the_report_compares(
    bench, spec, initial
):
    """The fake sites' loss is 10 less the mean value, to which a training adds the site's step."""
    bench.site("quick", step=3.0, examples=30)
    bench.site("slow", step=1.0, examples=10)
    wanted = spec(rounds=2, cohort={"min_sites": 2}, evaluation=ALONE)
    run = await bench.ended(await bench.enqueue(wanted))
    assert (run.state, run.reason) == ("finished", "all 2 rounds are done")
    start = 10 - float(np.mean([tensor.mean() for tensor in initial.values()]))
    found = reports(bench.running, run)
    step = (30 * 3.0 + 10 * 1.0) / 40  # of the weighted mean, in each round
    for site, own_step, share in (("quick", 3.0, 0.75), ("slow", 1.0, 0.25)):
        report = found[site]
        assert report.rounds == 2
        assert report.data_share == share
        assert report.initial == pytest.approx(start, abs=1e-5)
        assert report.alone == pytest.approx(start - 2 * own_step, abs=1e-5)
        assert report.federated == pytest.approx(start - 2 * step, abs=1e-5)
        assert report.gain == pytest.approx(2 * (step - own_step), abs=1e-5)
    assert (found["quick"].worth_joining, found["slow"].worth_joining) == (False, True)
    assert [a.alone_rounds for a in alone(bench, run).values()] == [2, 2]
    assert not any(a.bytes_up for a in alone(bench, run).values())


@pytest.mark.parametrize(("metric", "is_higher_better"), [("shortened_share", False), ("accuracy", True)])
async def test_a_report_by_another_metric_knows_its_direction(bench, spec, metric, is_higher_better):
    bench.site("a")
    run = await bench.ended(await bench.enqueue(spec(rounds=1)))
    message, _ = told(bench.running, run)
    assert goal_of(message, metric).higher_is_better is is_higher_better


async def test_a_report_of_a_run_that_is_judged_by_its_training_is_by_the_loss(bench, spec):
    bench.site("a")
    stop = {"patience": {"metric": "train_loss", "evaluations": 9}}
    run = await bench.ended(await bench.enqueue(spec(rounds=1, evaluation=ALONE, stop=stop)))
    assert run.spec.goal.metric == "train_loss"
    assert goal_of(told(bench.running, run)[0]).metric == "loss"
    assert reports(bench.running, run)["a"].gain is not None


async def test_updates_that_no_model_holds_are_no_rounds_of_a_site(bench, spec):
    bench.site("a")
    run = await bench.ended(await bench.enqueue(spec(rounds=2)))
    store = bench.running.store
    last = store.assignments(run.id, 2)[-1]
    open_buffer = Round(
        run_id=run.id, number=3, state="failed", base_digest=run.model_digest, started_at_s=1.0
    )
    facts = {"run_id": run.id, "round": 3, "attempt": 1, "work": "train", "site": "a", "state": "done"}
    left = Assignment(
        id=f"{run.id}.3.1.train.a", model_digest=last.model_digest, model_bytes=last.model_bytes, **facts
    )
    store.save(open_buffer, left)
    run.spec_json = spec(rounds=2, evaluation=ALONE).model_dump_json()
    await train_alone(run, bench.running.runs._federation)
    assert alone(bench, run)["a"].alone_rounds == 2
    assert reports(bench.running, run)["a"].rounds == 2


async def test_a_site_that_refuses_or_is_gone_is_shown_with_the_reason(bench, spec, clock, fault):
    bench.site("stays")
    bench.site("refuses", fault=fault.REFUSES_ALONE)
    leaves = bench.site("leaves")
    leaves.alone_gate = asyncio.Event()
    wanted = spec(cohort={"min_sites": 3, "stall_s": 1}, evaluation=ALONE)
    run = await bench.enqueue(wanted)
    await bench.until(lambda: len(alone(bench, run)) == 3)
    await bench.detach("leaves")
    await bench.until(lambda: alone(bench, run)["stays"].state == "done")
    clock.now_s += 1.1
    run = await bench.ended(run)
    assert run.state == "finished"
    found = reports(bench.running, run)
    assert found["stays"].gain is not None
    assert found["refuses"].why_not == "alone: refused, policy.alone is false"
    assert found["leaves"].why_not.startswith("alone: lost, no progress for 1 s")
    assert found["leaves"].worth_joining is None
    assert found["leaves"].federated is not None


@pytest.mark.parametrize("mode", [{"kind": "sync"}, {"kind": "async", "buffer": 1}])
async def test_a_restart_meanwhile_goes_on_with_the_trainings_alone(config, bench_of, spec, mode):
    async with coordinator(config) as running:
        bench = bench_of(running)
        site = bench.site("a")
        site.alone_gate = asyncio.Event()
        run = await bench.enqueue(spec(rounds=2, mode=mode, evaluation=ALONE))
        await bench.until(lambda: alone(bench, run))
        assert "trains alone" in running.store.run(run.id).reason
        await bench.detach("a")
    async with coordinator(config) as running:
        bench = bench_of(running)
        site.alone_gate.set()
        bench.attach(site)
        run = await bench.ended(run)
        assert run.state == "finished"
        assert [a.state for a in alone(bench, run).values()] == ["done"]
        assert len([name for name in site.trained if f"{run.id}." in name]) == 2
        assert reports(running, run)["a"].rounds == 2


async def test_a_run_that_is_stopped_meanwhile_can_be_resumed(bench, spec):
    site = bench.site("a")
    site.alone_gate = asyncio.Event()
    run = await bench.enqueue(spec(evaluation=ALONE))
    await bench.until(lambda: alone(bench, run))
    await bench.running.runs.stop(run.id, "enough")
    assert alone(bench, run)["a"].state == "cancelled"
    site.alone_gate.set()
    bench.running.runs.resume(run.id)
    run = await bench.ended(run)
    assert run.state == "finished"
    assert alone(bench, run)["a"].state == "done"


async def test_without_trainings_alone_the_report_says_why_it_does_not_know(bench, spec):
    bench.site("a")
    run = await bench.ended(await bench.enqueue(spec()))
    report = reports(bench.running, run)["a"]
    assert (report.alone, report.worth_joining) == (None, None)
    assert "evaluation.alone" in report.why_not
    message, rounds = told(bench.running, run)
    goal = Goal(metric="accuracy", higher_is_better=True)
    data = report_data(message, site_reports(message, rounds, goal), goal)
    assert data["sites"][0]["federated"] is None


async def test_the_final_model_that_is_compared_is_the_best_where_it_is_restored(bench, spec, initial):
    site = bench.site("a")
    start = float(initial["layer.bias"].mean())
    by_round = {0: 5.0, 1: 2.0, 2: 3.0, 3: 4.0}
    site.measure = lambda tensors: by_round[round(float(tensors["layer.bias"].mean()) - start)]
    wanted = spec(rounds=50, stop={"patience": {"evaluations": 1}}, evaluation=ALONE)
    run = await bench.ended(await bench.enqueue(wanted))
    report = reports(bench.running, run)["a"]
    assert (report.rounds, report.initial, report.federated, report.alone) == (3, 5.0, 2.0, 4.0)
    assert report.gain == 2.0


@pytest.mark.parametrize(("every_rounds", "federated"), [(1, 2.0), (0, 4.5)])
async def test_who_has_yet_to_measure_the_final_model_is_asked_to(
    bench, spec, initial, every_rounds, federated
):
    """Each round has one of two sites, so one at most has measured the best round's model."""
    by_round = {0: 5.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 4.5}
    start = float(initial["layer.bias"].mean())
    for name in ("a", "b"):
        site = bench.site(name)
        site.measure = lambda tensors: by_round[round(float(tensors["layer.bias"].mean()) - start)]
    await bench.until(lambda: len(bench.running.sites.connected()) == 2)
    patience = {"stop": {"patience": {"evaluations": 10}}} if every_rounds else {}
    wanted = spec(
        rounds=4, cohort={"fraction": 0.5, "policy": "round_robin"},
        evaluation=ALONE | {"every_rounds": every_rounds}, **patience,
    )  # fmt: skip
    run = await bench.ended(await bench.enqueue(wanted))
    assert run.state == "finished"
    found = reports(bench.running, run)
    assert [found[site].federated for site in ("a", "b")] == [federated, federated]
    assert [found[site].alone for site in ("a", "b")] == [3.0, 3.0]  # two rounds each


async def test_an_asynchronous_run_goes_on_if_its_last_version_turns_out_better(bench, spec, initial):
    """As one in rounds does; and it does not end before what it is judged by is known."""
    site = bench.site("a")
    start = float(initial["layer.bias"].mean())
    site.measure = lambda tensors: {0: 5.0, 1: 6.0, 2: 1.0}.get(
        round(float(tensors["layer.bias"].mean()) - start), 7.0
    )
    mode = {"kind": "async", "buffer": 1}
    wanted = spec(rounds=50, mode=mode, stop={"patience": {"evaluations": 1}}, evaluation=ALONE)
    run = await bench.ended(await bench.enqueue(wanted))
    assert run.state == "finished"
    losses = [record.metrics.get("loss") for record in bench.running.store.rounds(run.id)]
    assert min(loss for loss in losses if loss) == float(run.reason.split("its best is ")[1].split()[0])
