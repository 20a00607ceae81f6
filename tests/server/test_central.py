"""Sites of the operator's own that only measure (evaluation.central)."""

import asyncio

import pytest
from rich.console import Console

from fedloom_common.errors import NotFound
from fedloom_server.app import coordinator
from fedloom_server.central import Central
from fedloom_server.console.measured import sites_data, sites_table
from fedloom_server.models import MODEL_FILE
from fedloom_server.rpc.messages import round_message

CENTRAL = {"when": "before_training", "central": ["lab"]}


def metrics(running, run, name):
    return {record.number: record.metrics.get(name) for record in running.store.rounds(run.id)}


def works(running, run, site):
    return [(a.work, a.round) for a in running.store.assignments(run.id) if a.site == site]


def done(running, run, site):
    rows = running.store.assignments(run.id)
    return [(a.work, a.round) for a in rows if a.site == site and a.state == "done"]


@pytest.mark.parametrize("when", ["before_training", "after_round"])
async def test_a_central_site_measures_every_model_and_its_metrics_stand_by_themselves(bench, spec, when):
    bench.evaluator("lab", loss=2.5)
    site = bench.site("a")
    site.measure = lambda tensors: 4.0
    await bench.until(lambda: len(bench.running.sites.connected()) == 2)
    run = await bench.ended(await bench.enqueue(spec(rounds=2, evaluation=CENTRAL | {"when": when})))
    assert run.state == "finished"
    assert metrics(bench.running, run, "central_loss") == {0: 2.5, 1: 2.5, 2: 2.5}
    assert metrics(bench.running, run, "loss") == {0: 4.0, 1: 4.0, 2: 4.0}
    assert works(bench.running, run, "lab") == [("evaluate", 0), ("evaluate", 1), ("evaluate", 2)]


@pytest.mark.parametrize("when", ["before_training", "after_round"])
async def test_a_site_that_trains_cannot_set_a_central_metric(bench, spec, when, monkeypatch):
    bench.evaluator("lab", loss=2.5)
    bench.site("a")
    liar = bench.site("liar")
    monkeypatch.setattr(liar, "_measured", lambda tensors: {"loss": 4.0, "central_loss": 0.01})
    await bench.until(lambda: len(bench.running.sites.connected()) == 3)
    cohort = {"min_sites": 2, "quorum": 1}
    wanted = spec(rounds=2, cohort=cohort, evaluation=CENTRAL | {"when": when})
    run = await bench.ended(await bench.enqueue(wanted))
    assert run.state == "finished"
    assert metrics(bench.running, run, "central_loss") == {0: 2.5, 1: 2.5, 2: 2.5}


async def test_a_site_that_only_measures_is_given_nothing_else(bench, spec):
    bench.evaluator("lab", loss=2.5)
    run = await bench.enqueue(spec())
    waiting = await bench.waits(run, "training")
    assert "1 lacks training (it only measures)" in waiting.reason
    bench.site("a")
    run = await bench.ended(run)
    assert works(bench.running, run, "lab") == []
    assert metrics(bench.running, run, "central_loss") == {0: None, 1: None}


async def test_a_central_site_trains_in_no_round_whatever_it_says_of_itself(bench, spec):
    bench.site("lab")
    run = await bench.enqueue(spec(evaluation=CENTRAL))
    await bench.waits(run, "0 of 1 fit")
    bench.site("a")
    run = await bench.ended(run)
    assert {work for work, _ in works(bench.running, run, "lab")} == {"evaluate"}


async def test_a_model_is_measured_while_the_next_round_trains_and_the_round_waits_for_it(bench, spec):
    lab = bench.evaluator("lab", loss=2.5)
    lab.evaluate_gate = asyncio.Event()
    await bench.until(lambda: bench.running.sites.connected())
    bench.site("a")
    run = await bench.enqueue(spec(rounds=3, evaluation=CENTRAL))
    store = bench.running.store
    await bench.until(lambda: store.run(run.id).rounds_done == 1)  # beside the measurement of round 0's
    await asyncio.sleep(0.2)
    assert store.run(run.id).rounds_done == 1
    lab.evaluate_gate.set()
    run = await bench.ended(run)
    assert run.state == "finished"
    assert metrics(bench.running, run, "central_loss")[3] == 2.5


async def test_a_silent_central_site_holds_a_round_no_longer_than_its_deadline(bench, spec, clock):
    lab = bench.evaluator("lab", loss=2.5)
    lab.evaluate_gate = asyncio.Event()
    await bench.until(lambda: bench.running.sites.connected())
    site = bench.site("a")
    site.measure = lambda tensors: 4.0
    wanted = spec(rounds=1, evaluation=CENTRAL | {"deadline_s": 0.3})
    run = await bench.enqueue(wanted)
    for count, work in enumerate((("train", 1), ("evaluate", 1)), start=1):  # what site a measures
        await bench.until(lambda work=work: work in done(bench.running, run, "a"))
        await bench.until(lambda count=count: len(lab.asked) == count)
        clock.now_s += 0.31
    run = await bench.ended(run)
    assert run.state == "finished"
    lost = [a for a in bench.running.store.assignments(run.id) if a.site == "lab"]
    assert {a.state for a in lost} == {"lost"}
    assert all("not finished by the deadline of 0.3 s" in a.reason for a in lost)
    assert set(metrics(bench.running, run, "central_loss").values()) == {None}
    assert metrics(bench.running, run, "loss") == {0: 4.0, 1: 4.0}


async def test_a_run_may_stop_by_a_central_metric(bench, spec):
    bench.evaluator("lab", loss=2.5)
    await bench.until(lambda: bench.running.sites.connected())
    bench.site("a")
    stop = {"target": {"metric": "central_loss", "value": 3.0}}
    run = await bench.ended(await bench.enqueue(spec(rounds=50, evaluation=CENTRAL, stop=stop)))
    assert run.reason == "central_loss is 2.5 after round 0, at or below the target of 3"
    assert run.rounds_done == 1


async def test_a_restart_goes_on_with_a_central_measurement(config, bench_of, spec):
    async with coordinator(config) as running:
        bench = bench_of(running)
        lab = bench.evaluator("lab", loss=2.5)
        await bench.until(lambda: running.sites.connected())
        site = bench.site("a")
        lab.evaluate_gate = asyncio.Event()
        run = await bench.enqueue(spec(rounds=1, evaluation=CENTRAL))
        await bench.until(lambda: running.store.run(run.id).rounds_done == 1)
        for name in ("lab", "a"):
            await bench.detach(name)
    lab.evaluate_gate.set()
    async with coordinator(config) as running:
        bench = bench_of(running)
        bench.attach(lab)
        bench.attach(site)
        run = await bench.ended(run)
        assert metrics(running, run, "central_loss")[1] == 2.5


async def test_an_asynchronous_run_is_measured_centrally_too(bench, spec):
    bench.evaluator("lab", loss=2.5)
    await bench.until(lambda: bench.running.sites.connected())
    bench.site("a")
    wanted = spec(rounds=3, mode={"kind": "async", "buffer": 1}, evaluation=CENTRAL)
    run = await bench.ended(await bench.enqueue(wanted))
    assert run.state == "finished"
    assert metrics(bench.running, run, "central_loss")[3] == 2.5


async def test_an_error_of_a_measurement_beside_versions_ends_the_run_as_one_between_rounds_does(
    bench, spec, monkeypatch
):
    async def lost(central, number):
        raise NotFound(f"the model of round {number} is gone")

    monkeypatch.setattr(Central, "_measure", lost)
    bench.site("a")
    for mode in ({"kind": "sync"}, {"kind": "async", "buffer": 1}):
        run = await bench.ended(await bench.enqueue(spec(rounds=9, mode=mode, evaluation=CENTRAL)))
        assert (run.state, run.reason.removesuffix(" is gone")[:-1]) == ("failed", "the model of round ")
        assert run.rounds_done < 9


async def test_each_sites_metrics_by_round_as_a_table_and_as_data(bench, spec):
    bench.evaluator("lab", loss=2.5)
    await bench.until(lambda: bench.running.sites.connected())
    for name, loss in (("a", 3.0), ("b", 5.0)):
        bench.site(name).measure = lambda tensors, loss=loss: loss
    wanted = spec(rounds=1, cohort={"min_sites": 2}, evaluation=CENTRAL)
    run = await bench.ended(await bench.enqueue(wanted))
    store = bench.running.store
    rounds = [
        round_message(record, store.assignments(run.id, record.number), MODEL_FILE, central=("lab",))
        for record in store.rounds(run.id)
    ]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(sites_table(rounds, "loss"))
    lines = [line.split() for line in captured.get().splitlines()]
    assert lines[0] == ["round", "all", "sites", "a", "b", "lab", "(central)"]
    assert lines[1:] == [[n, "4.0000", "3.0000", "5.0000", "2.5000"] for n in ("0", "1")]
    data = sites_data(rounds)
    assert data["b"]["rounds"]["0"]["metrics"]["loss"] == 5.0
    assert (data["lab"]["is_central"], data["a"]["is_central"]) == (True, False)
