"""Asynchronous runs: no site waits for another, and the versions are what the updates make by hand.

Sites train for as long as their gate is closed, so that each test says itself who is how fast.
"""

import asyncio
import errno
import os
import threading

import numpy as np
import pytest
from disks import copy_of, counted
from safetensors.numpy import load_file

from fedloom.v1 import session_pb2 as pb
from fedloom_common.errors import BadTensor
from fedloom_server import folding
from fedloom_server.app import coordinator
from fedloom_server.buffered import _Flow
from fedloom_server.config import KeepModels
from fedloom_server.idle import IdleSites
from fedloom_server.records import AssignmentState, Round, Work
from fedloom_server.store import Store

STEPS = {"a": 1.0, "b": 4.0, "slow": 8.0}
EXAMPLES = {"a": 10, "b": 30, "slow": 20}


@pytest.fixture
def async_spec(spec):
    def make(*, buffer=2, concurrency=None, most=20, exponent=0.5, server_lr=1.0, **changes):
        mode = {
            "kind": "async",
            "buffer": buffer,
            "concurrency": concurrency,
            "staleness": {"exponent": exponent, "max": most},
            "server_lr": server_lr,
        }
        return spec(mode=mode, **({"evaluation": {"initial": False, "every_rounds": 0}} | changes))

    return make


def gated(bench, name):
    """A site whose trainings end when the test says so."""
    site = bench.site(name, step=STEPS[name], examples=EXAMPLES[name])
    site.gate = asyncio.Semaphore(0)
    return site


async def let_end(bench, run, site, *, training=1):
    """One training of a site ends, and its update is in."""
    await bench.until(lambda: len(trainings_asked(site)) >= training)
    site.gate.release()
    name = f"{run.id}.{training}.1.train.{site.name}"
    await bench.until(lambda: bench.running.store.assignment(name).state is AssignmentState.DONE)


def free(site):
    """Its trainings end at once from now on."""
    for _ in range(20):
        site.gate.release()


def trainings_asked(site):
    return {asked.id for asked in site.asked if asked.work == pb.WORK_TRAIN}


def trainings(bench, run):
    return [a for a in bench.running.store.assignments(run.id) if a.work is Work.TRAIN]


def version(bench, run):
    return bench.running.store.run(run.id).rounds_done


def bias_of(bench, run, initial):
    """How far the latest model has moved."""
    return float(np.mean(bench.model(run)["layer.bias"] - initial["layer.bias"]))


async def test_a_version_is_the_mean_of_the_next_updates_that_come(bench, async_spec, initial):
    bench.site("a", step=1.0, examples=10)
    bench.site("b", step=4.0, examples=30)
    run = await bench.ended(await bench.enqueue(async_spec(rounds=1, cohort={"min_sites": 2})))
    assert (run.state, run.rounds_done, run.reason) == ("finished", 1, "the only round is done")
    assert bias_of(bench, run, initial) == pytest.approx((10 * 1 + 30 * 4) / 40, rel=1e-6)


async def test_an_update_joins_a_newer_model_with_the_weight_of_its_staleness(bench, async_spec, initial):
    a, b, slow = (gated(bench, name) for name in ("a", "b", "slow"))
    run = await bench.enqueue(async_spec(rounds=3, cohort={"min_sites": 3}))
    for number in (1, 2):
        await let_end(bench, run, a, training=number)
        await bench.until(lambda number=number: len(trainings_asked(a)) == number + 1)
        await let_end(bench, run, b, training=number)
        await bench.until(lambda number=number: len(trainings_asked(b)) == number + 1)
        assert version(bench, run) == number
    # the first update of a buffer lets its site begin anew before the version is made
    first, second = (10 * 1 + 30 * 4) / 40, (10 * 2**-0.5 * 1 + 30 * 4) / 40
    assert bias_of(bench, run, initial) == pytest.approx(first + second, rel=1e-6)
    await let_end(bench, run, slow)
    await let_end(bench, run, a, training=3)
    run = await bench.ended(run)
    third = (20 * 3**-0.5 * 8 + 10 * 2**-0.5 * 1) / (20 + 10)
    assert bias_of(bench, run, initial) == pytest.approx(first + second + third, rel=1e-6)
    last = {t.site: t.staleness for t in trainings(bench, run) if t.round == 3 and t.state == "done"}
    assert last == {"slow": 2, "a": 1}
    assert bench.running.store.rounds(run.id)[-1].metrics["train_staleness"] == 1.5


async def test_a_site_that_never_ends_keeps_nobody_waiting(bench, async_spec, initial, fault):
    bench.site("a", step=1.0)
    bench.site("b", step=1.0)
    silent = bench.site("silent", fault=fault.SILENT)
    spec = async_spec(rounds=6, cohort={"min_sites": 3, "stall_s": 1000})
    run = await bench.ended(await bench.enqueue(spec))
    assert (run.state, run.rounds_done) == ("finished", 6)
    (assignment,) = [t for t in trainings(bench, run) if t.site == "silent"]
    assert (assignment.state, assignment.reason) == ("cancelled", "the run's last version has its updates")
    await bench.until(lambda: assignment.id in silent.cancelled)


async def test_no_more_sites_train_than_the_concurrency_allows(bench, async_spec):
    sites = [gated(bench, name) for name in ("a", "b", "slow")]
    run = await bench.enqueue(async_spec(rounds=4, concurrency=2, cohort={"min_sites": 3}))
    while not bench.running.store.run(run.id).state.is_end:
        training = [t for t in trainings(bench, run) if t.state == "open"]
        assert len(training) <= 2
        for site in sites:
            if len(trainings_asked(site)) > len(site.trained) and not site.gate._value:
                site.gate.release()
        await asyncio.sleep(0.01)
    assert len(trainings(bench, run)) >= 8


async def test_a_site_that_fails_is_replaced_and_rests(bench, async_spec, initial, fault):
    bad = bench.site("bad", fault=fault.FAILS)
    bench.site("good", step=2.0)
    spec = async_spec(buffer=1, rounds=5, concurrency=1, cohort={"min_sites": 2})
    run = await bench.ended(await bench.enqueue(spec))
    assert run.state == "finished"
    assert bias_of(bench, run, initial) == pytest.approx(10.0, rel=1e-6)
    assert len(bad.asked) <= 2


async def test_a_run_that_nobody_can_work_for_says_why_and_goes_on_by_itself(bench, async_spec, fault):
    bad = bench.site("bad", fault=fault.FAILS)
    run = await bench.enqueue(async_spec(buffer=1, rounds=1))
    await bench.until(lambda: "bad failed: ValueError" in bench.running.store.run(run.id).reason)
    await bench.detach("bad")
    await bench.waits(run, "waits for sites: 0 of 1 fit, 0 connected")
    bad.fault = fault.NONE
    bench.attach(bad)
    run = await bench.ended(run)
    assert (run.state, run.reason) == ("finished", "the only round is done")


async def test_a_run_whose_sites_all_fail_time_and_again_leaves_its_place_and_goes_on_with_a_mended_one(
    config, bench_of, async_spec, fault, monkeypatch
):
    monkeypatch.setattr("fedloom_server.idle.REST_S", 0.2)
    monkeypatch.setattr("fedloom_server.waiting.FIRST_PAUSE_S", 0.2)
    async with coordinator(config.model_copy(update={"concurrent_runs": 1})) as running:
        bench = bench_of(running)
        sites = [bench.site(name, fault=fault.FAILS) for name in "ab"]
        run = await bench.enqueue(async_spec(buffer=1, rounds=1, cohort={"min_sites": 2}))
        other = await bench.enqueue(async_spec(name="other", buffer=1, rounds=1))
        reason = (await bench.waits(run, "goes on when a site attaches again")).reason
        assert "every site has failed 3 times or more in a row (a failed: ValueError: no such file" in reason
        assert "b failed: ValueError" in reason
        assert running.store.failures(run.id)[-1].cause == "waiting"
        await bench.until(lambda: running.store.run(other.id).started_at_s > 0)
        await bench.detach("a")
        sites[0].fault = fault.NONE
        bench.attach(sites[0])
        for ended in (await bench.ended(run), await bench.ended(other)):
            assert ended.state == "finished"


async def test_a_run_whose_sites_have_all_gone_leaves_its_place_and_goes_on_with_the_first_to_return(
    config, bench_of, async_spec, initial, clock, fault
):
    """By hand: a makes each of the two versions alone; the other run takes the only place meanwhile."""
    async with coordinator(config.model_copy(update={"concurrent_runs": 1})) as running:
        bench = bench_of(running)
        a = gated(bench, "a")
        bench.site("b", fault=fault.FAILS)
        run = await bench.enqueue(async_spec(buffer=1, rounds=2, cohort={"min_sites": 2, "stall_s": 1}))
        other = await bench.enqueue(async_spec(name="other", buffer=1, rounds=1))
        await let_end(bench, run, a)
        await bench.until(lambda: version(bench, run) == 1)
        for name in "ab":
            await bench.detach(name)
        clock.now_s += 1.1
        await bench.waits(run, "waits for sites: 0 of 1 fit, 0 connected")
        assert (await bench.in_state(other, "waiting")).reason == running.store.run(run.id).reason
        free(a)
        bench.attach(a)
        for ended in (await bench.ended(run), await bench.ended(other)):
            assert ended.state == "finished"
        assert bias_of(bench, run, initial) == pytest.approx(2.0, rel=1e-6)


async def test_a_measurement_that_everybody_answered_before_a_kill_needs_no_site_after_it(
    config, bench_of, async_spec, tmp_path, monkeypatch
):
    disk, keep = tmp_path / "disk", Store.save

    def save(self, *records):
        if not disk.exists() and any(isinstance(r, Round) and r.state == "finished" for r in records):
            copy_of(config.state_dir, disk)
        keep(self, *records)

    monkeypatch.setattr(Store, "save", save)
    measured = {"initial": False, "every_rounds": 1}
    async with coordinator(config) as running:
        bench = bench_of(running)
        bench.site("a")
        run = await bench.ended(await bench.enqueue(async_spec(buffer=1, rounds=1, evaluation=measured)))
        await bench.detach("a")
    async with coordinator(config.model_copy(update={"state_dir": disk})) as running:
        assert (await bench_of(running).ended(run)).state == "finished"
        assert "loss" in running.store.rounds(run.id)[-1].metrics


async def test_a_site_that_goes_away_is_replaced_and_its_update_counts_if_it_comes_back(
    bench, async_spec, initial
):
    a, b = gated(bench, "a"), gated(bench, "b")
    run = await bench.enqueue(async_spec(rounds=1, concurrency=1, cohort={"min_sites": 2}))
    await bench.until(lambda: a.asked or b.asked)
    first, second = (a, b) if a.asked else (b, a)
    await bench.detach(first.name)
    await let_end(bench, run, second)
    bench.attach(first)
    first.gate.release()
    run = await bench.ended(run)
    assert bias_of(bench, run, initial) == pytest.approx(3.25, rel=1e-6)


async def test_a_training_that_falls_too_far_behind_is_given_up_and_its_site_begins_anew(
    bench, async_spec, initial
):
    a, slow = gated(bench, "a"), gated(bench, "slow")
    run = await bench.enqueue(async_spec(buffer=1, rounds=4, most=1, cohort={"min_sites": 2}))
    for number in (1, 2):
        await let_end(bench, run, a, training=number)
    await bench.until(lambda: len(trainings_asked(slow)) == 2)
    old, new = [t for t in trainings(bench, run) if t.site == "slow"]
    assert (old.state, old.reason) == (
        "cancelled",
        "its model is 2 versions old, mode.staleness.max is 1",
    )
    assert (new.state, new.staleness) == ("open", 0)
    assert slow.cancelled == {old.id: old.reason}
    free(slow)
    await let_end(bench, run, a, training=3)
    run = await bench.ended(run)
    assert run.state == "finished"


async def test_sites_are_told_how_often_they_trained_and_where_the_schedule_stands(bench, async_spec):
    a, slow = gated(bench, "a"), gated(bench, "slow")
    run = await bench.enqueue(async_spec(buffer=1, rounds=3, cohort={"min_sites": 2}))
    for number in (1, 2):
        await let_end(bench, run, a, training=number)
    await let_end(bench, run, slow)
    run = await bench.ended(run)
    told = {(asked.round, asked.schedule_round, asked.attempt) for asked in a.asked}
    assert {(1, 1, 1), (2, 2, 1), (3, 3, 1)} >= told >= {(1, 1, 1), (2, 2, 1)}
    assert [(asked.round, asked.schedule_round) for asked in slow.asked] == [(1, 1)]


@pytest.mark.parametrize("staged", [1, 2])
async def test_a_buffer_may_be_larger_than_what_may_lie_on_disk(
    config, bench_of, async_spec, initial, staged
):
    async with coordinator(config.model_copy(update={"staged_updates": staged})) as running:
        bench = bench_of(running)
        for name in "abc":
            bench.site(name, step=2.0)
        run = await bench.ended(await bench.enqueue(async_spec(buffer=6, rounds=3, cohort={"min_sites": 3})))
        assert run.state == "finished"
        _assert_models_by_hand(running.store, run, dict.fromkeys("abc", 2.0))
        assert not list(running.store.spool.folder.iterdir())


async def test_the_step_of_a_version_is_scaled_by_the_server_rate(bench, async_spec, initial):
    bench.site("a", step=2.0)
    run = await bench.ended(await bench.enqueue(async_spec(buffer=1, rounds=1, server_lr=0.25)))
    assert bias_of(bench, run, initial) == pytest.approx(0.5, rel=1e-6)


async def test_versions_are_measured_while_sites_train_and_the_last_one_always(bench, async_spec, fault):
    a, slow = gated(bench, "a"), gated(bench, "slow")
    evaluation = {"initial": True, "every_rounds": 1}
    run = await bench.enqueue(async_spec(buffer=1, rounds=4, evaluation=evaluation, cohort={"min_sites": 2}))
    await let_end(bench, run, a)
    await bench.until(lambda: version(bench, run) == 1)
    await let_end(bench, run, a, training=2)  # the slow site has yet to measure version 1, and nobody waits
    await bench.until(lambda: version(bench, run) == 2)
    first, second = bench.running.store.rounds(run.id)[1:3]
    assert (first.state, second.state) == ("evaluating", "finished")
    await let_end(bench, run, slow)
    await bench.until(lambda: "loss" in bench.running.store.rounds(run.id)[1].metrics)
    await let_end(bench, run, a, training=3)
    run = await bench.ended(run)
    rounds = bench.running.store.rounds(run.id)
    assert all(record.state == "finished" for record in rounds)
    assert {0, 1, 4} <= {record.number for record in rounds if "loss" in record.metrics}
    measured = [a for a in bench.running.store.assignments(run.id, 4) if a.work is Work.EVALUATE]
    assert {a.site for a in measured} == {"a", "slow"}


async def test_a_site_that_measures_for_ever_holds_a_version_no_longer_than_its_deadline(
    bench, async_spec, clock, monkeypatch
):
    monkeypatch.setattr("fedloom_server.idle.REST_S", 0.2)
    site = bench.site("a")
    site.evaluate_gate = asyncio.Event()
    evaluation = {"initial": False, "every_rounds": 1, "deadline_s": 0.3}
    spec = async_spec(buffer=1, rounds=2, evaluation=evaluation, cohort={"stall_s": 1000})
    run = await bench.enqueue(spec)
    await bench.until(lambda: [asked for asked in site.asked if asked.work == pb.WORK_EVALUATE])
    clock.now_s += 0.31
    await bench.until(lambda: version(bench, run) == 2, seconds=10)
    site.evaluate_gate.set()
    run = await bench.ended(run)
    (lost,) = [a for a in bench.running.store.assignments(run.id, 1) if a.work is Work.EVALUATE]
    assert (lost.state, lost.reason.split(";")[0]) == ("lost", "not finished by the deadline of 0.3 s")
    assert ["loss" in record.metrics for record in bench.running.store.rounds(run.id)] == [False, True]


async def test_a_run_that_ends_while_a_version_is_measured_keeps_what_is_whole(bench, async_spec):
    bench.evaluator("lab", loss=2.5)
    await bench.until(lambda: bench.running.sites.connected())
    a, slow = gated(bench, "a"), gated(bench, "slow")
    a.measure = lambda tensors: 4.0
    stop = {"target": {"metric": "train_loss", "value": 2.5}}  # met by version 2
    evaluation = {"initial": False, "every_rounds": 1, "central": ["lab"]}
    spec = async_spec(buffer=1, rounds=9, evaluation=evaluation, stop=stop, cohort={"min_sites": 2})
    run = await bench.enqueue(spec)
    for number in (1, 2):
        await let_end(bench, run, a, training=number)
    run = await bench.ended(run)
    first, last = bench.running.store.rounds(run.id)[:2]
    assert (run.rounds_done, first.state) == (2, "finished")
    assert first.metrics["central_loss"] == 2.5
    assert "loss" not in first.metrics  # one of two sites has told its own
    assert [asked.round for asked in slow.asked if asked.work == pb.WORK_EVALUATE] == [2]
    assert "loss" in last.metrics  # of both sites: the last one is always measured


async def test_a_run_that_ends_while_its_last_version_is_measured_waits_for_that(bench, async_spec):
    lab, a = bench.evaluator("lab", loss=2.5), gated(bench, "a")
    lab.evaluate_gate, a.evaluate_gate = asyncio.Event(), asyncio.Event()
    await bench.until(lambda: len(bench.running.sites.connected()) == 2)
    stop = {"target": {"metric": "central_loss", "value": 2.6}}
    evaluation = {"initial": False, "every_rounds": 1, "central": ["lab"]}
    run = await bench.enqueue(async_spec(buffer=1, rounds=9, evaluation=evaluation, stop=stop))
    a.evaluate_gate.set()
    await let_end(bench, run, a)
    await bench.until(lambda: bench.running.store.rounds(run.id)[0].state == "finished")
    a.evaluate_gate.clear()
    await let_end(bench, run, a, training=2)
    asked = lambda: [it.round for it in a.asked if it.work == pb.WORK_EVALUATE]  # noqa: E731
    await bench.until(lambda: asked() == [1, 2])
    lab.evaluate_gate.set()  # version 1 has met the target, which is known only now
    await bench.until(lambda: "central_loss" in bench.running.store.rounds(run.id)[0].metrics)
    a.evaluate_gate.set()
    run = await bench.ended(run)
    assert (run.rounds_done, asked()) == (2, [1, 2])
    assert "loss" in bench.running.store.rounds(run.id)[1].metrics


async def test_a_target_ends_the_run_although_younger_versions_are_in_the_making(bench, async_spec):
    bench.site("a", step=1.0)
    bench.site("b", step=1.0)
    stop = {"target": {"metric": "loss", "value": 7.0}}
    evaluation = {"initial": True, "every_rounds": 1}
    run = await bench.ended(await bench.enqueue(async_spec(rounds=100, stop=stop, evaluation=evaluation)))
    assert run.state == "finished"
    assert run.rounds_done < 20
    assert "at or below the target of 7" in run.reason
    assert not [record for record in bench.running.store.rounds(run.id) if record.ended_at_s == 0]
    assert not [a for a in bench.running.store.assignments(run.id) if a.state == "open"]


async def test_the_model_that_an_open_training_began_from_is_kept_as_long(config, bench_of, async_spec):
    async with coordinator(config.model_copy(update={"keep_models": KeepModels(last=1, best=0)})) as running:
        bench = bench_of(running)
        a, slow = gated(bench, "a"), gated(bench, "slow")
        run = await bench.enqueue(async_spec(buffer=1, rounds=5, cohort={"min_sites": 2}))
        await let_end(bench, run, a)
        await let_end(bench, run, slow)
        await bench.until(lambda: len(trainings_asked(slow)) == 2)
        base = running.store.files.path(
            [t for t in trainings(bench, run) if t.site == "slow"][1].model_digest
        )
        for number in (2, 3):
            await let_end(bench, run, a, training=number)
        await bench.until(lambda: version(bench, run) == 4)
        assert base.exists()
        await let_end(bench, run, slow, training=2)
        run = await bench.ended(run)
        assert run.state == "finished"
        assert not base.exists()


async def test_a_stopped_run_goes_on_after_resume(bench, async_spec, initial):
    a, b = gated(bench, "a"), gated(bench, "b")
    run = await bench.enqueue(async_spec(rounds=1, cohort={"min_sites": 2}))
    await let_end(bench, run, a)
    await bench.running.runs.stop(run.id, "enough")
    assert not list(bench.running.store.spool.folder.iterdir())
    for site in (a, b):
        free(site)
    bench.running.runs.resume(run.id)
    run = await bench.ended(run)
    assert (run.state, run.rounds_done) == ("finished", 1)


@pytest.mark.parametrize("rounds", [1, 3])
async def test_a_run_whose_updates_made_no_model_trains_again_when_it_is_resumed(
    config, bench_of, async_spec, initial, monkeypatch, rounds
):
    make, is_closed = folding.make_model, threading.Event()

    def overflow(*arguments):
        monkeypatch.setattr(folding, "make_model", make)
        assert is_closed.wait(20)
        raise BadTensor("the next model's tensor w is not finite in F32")

    monkeypatch.setattr(folding, "make_model", overflow)
    async with coordinator(config) as running:
        bench = bench_of(running)
        a, b = gated(bench, "a"), gated(bench, "b")
        run = await bench.enqueue(async_spec(rounds=rounds, buffer=1, cohort={"min_sites": 2}))
        await let_end(bench, run, a)
        await bench.until(lambda: running.store.round(run.id, 1).state == "aggregating")
        if rounds > 1:
            await let_end(bench, run, b)  # for version 2, whose base is never made
        is_closed.set()
        run = await bench.ended(run)
        assert run.state == "failed"
        running.runs.resume(run.id)
        await let_end(bench, run, a, training=2)
        await bench.until(lambda: version(bench, run) == 1)
        np.testing.assert_allclose(bias_of(bench, run, initial), STEPS["a"], rtol=1e-5)
    async with coordinator(config) as running:  # what was lost with version 2 does not come back
        bench.running = running
        for site in (a, b):
            site.gate = None
            bench.attach(site)
        run = await bench.ended(run)
        assert (run.state, run.rounds_done) == ("finished", rounds)
        attempts = {record.number: record.attempt for record in running.store.rounds(run.id)}
        assert attempts == ({1: 2} if rounds == 1 else {1: 2, 2: 2, 3: 1})
        counted = [t for t in trainings(bench, run) if t.state == "done" and t.attempt == attempts[t.round]]
        assert len(counted) == rounds


async def test_a_run_whose_disk_failed_while_a_version_was_made_makes_it_of_the_same_updates(
    bench, async_spec, initial, monkeypatch
):
    make = folding.make_model

    def fail(*arguments):
        monkeypatch.setattr(folding, "make_model", make)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folding, "make_model", fail)
    a, b = gated(bench, "a"), gated(bench, "b")
    run = await bench.enqueue(async_spec(rounds=1, cohort={"min_sites": 2}))
    await let_end(bench, run, a)
    await let_end(bench, run, b)
    run = await bench.ended(run)
    assert run.state == "failed"
    bench.running.runs.resume(run.id)
    run = await bench.ended(run)
    assert run.state == "finished"
    assert len(a.trained) == len(b.trained) == 1
    np.testing.assert_allclose(bias_of(bench, run, initial), (10 * 1 + 30 * 4) / 40, rtol=1e-5)


@pytest.mark.parametrize("turns", range(4))
async def test_a_stop_that_comes_just_after_news_is_not_lost(bench, async_spec, monkeypatch, turns):
    monkeypatch.setattr(IdleSites, "rest_s", lambda idle: 60.0)
    flow = _Flow(await bench.enqueue(async_spec()), bench.running.runs._federation)
    waiting = asyncio.create_task(flow.until_something_happens())
    await asyncio.sleep(0.05)
    flow._hear_news()
    for _ in range(turns):
        await asyncio.sleep(0)
    is_in_time = waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled() == is_in_time
    await flow.leave()


async def test_a_restarted_coordinator_goes_on_with_the_updates_of_the_buffer(
    config, bench_of, async_spec, initial
):
    async with coordinator(config) as running:
        bench = bench_of(running)
        a, b = gated(bench, "a"), gated(bench, "b")
        run = await bench.enqueue(async_spec(rounds=1, buffer=2, cohort={"min_sites": 2}))
        await let_end(bench, run, a)
    for site in (a, b):
        await bench.detach(site.name)
    async with coordinator(config) as running:
        bench.running = running
        bench.attach(b)
        b.gate.release()
        run = await bench.ended(run)
        assert bias_of(bench, run, initial) == pytest.approx(3.25, rel=1e-6)
        assert len(a.trained) == 1


@pytest.mark.parametrize(
    "every", [pytest.param(25, id="some"), pytest.param(1, id="every", marks=pytest.mark.slow)]
)
async def test_a_kill_at_any_transaction_loses_no_update_and_counts_none_twice(disks, bench_of, every):
    run, found = await disks()
    for disk in found[::every]:
        before = counted(disk.state_dir)
        async with coordinator(disk) as running:
            sites = await _finish(bench_of(running), run)
            rows = {a.id: a for a in running.store.assignments(run.id)}
            uncounted = [rows[name].reason for name in before if rows[name].state != "done"]
            assert set(uncounted) <= {"the run's last version has its updates"}
            assert not before & {trained for site in sites for trained in site.trained}


@pytest.mark.parametrize(
    "every", [pytest.param(15, id="some"), pytest.param(1, id="every", marks=pytest.mark.slow)]
)
async def test_what_a_power_cut_has_spoilt_is_asked_for_again(disks, bench_of, every):
    run, found = await disks()
    with_updates = [disk for disk in found if updates_on(disk.state_dir)]
    assert with_updates, "no update lay there at any moment"
    for disk in with_updates[::every]:
        spoilt = spoil(disk.state_dir)
        assert spoilt
        async with coordinator(disk) as running:
            sites = await _finish(bench_of(running), run)
            again = {name for site in sites for name in site.trained}
            too_late = {a.id for a in running.store.assignments(run.id) if a.state != "done"}
            assert spoilt <= again | too_late


def updates_on(state):
    """Trainings whose updates lie there and count."""
    return counted(state) & {path.stem for path in (state / "spool").iterdir()}


def spoil(state):
    """Turn the last bytes of each sum and each update that counts into others; gives those trainings."""
    spoilt = updates_on(state)
    for path in (state / "spool").iterdir():
        if path.stem in spoilt or path.suffix == ".sum":
            with path.open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"\xff\xff\xff\xff")
    return spoilt


@pytest.fixture
def disks(config, bench_of, async_spec, tmp_path, monkeypatch):
    """A run, and the disk as it was before each of its transactions: what a killed coordinator finds."""
    spec = async_spec(
        rounds=4, buffer=3, cohort={"min_sites": 3}, evaluation={"initial": True, "every_rounds": 2}
    )
    config = config.model_copy(update={"staged_updates": 2, "keep_models": KeepModels(last=100, best=0)})

    async def make():
        found = []

        def save(self, *records):
            if self is watched:
                found.append(copy_of(config.state_dir, tmp_path / f"disk-{len(found)}"))
            keep(self, *records)

        watched, keep = None, Store.save
        async with coordinator(config) as running:
            bench = bench_of(running)
            for name, step in STEPS.items():
                bench.site(name, step=step, examples=EXAMPLES[name])
            run = await bench.enqueue(spec)
            watched = running.store
            with monkeypatch.context() as patched:
                patched.setattr(Store, "save", save)
                run = await bench.ended(run)
            _assert_models_by_hand(running.store, run, STEPS)
            for name in bench.sites:
                await bench.detach(name)
        assert len(found) > 20
        return run, [config.model_copy(update={"state_dir": disk}) for disk in found]

    return make


async def _finish(bench, run):
    """Let new sites bring a run to its end; gives the sites."""
    sites = [bench.site(name, step=step, examples=EXAMPLES[name]) for name, step in STEPS.items()]
    run = await bench.ended(run)
    assert (run.state, run.rounds_done) == ("finished", 4)
    _assert_models_by_hand(bench.running.store, run, STEPS)
    for site in sites:
        await bench.detach(site.name)
    return sites


def _assert_models_by_hand(store, run, steps):
    """Every version is the one before and the steps of its updates, by formula, from what the rows say."""
    rounds = {record.number: record for record in store.rounds(run.id) if record.number}
    assert sorted(rounds) == list(range(1, run.rounds_done + 1))
    model = load_file(store.files.path(rounds[1].base_digest))
    mode = run.spec.mode
    for number, record in sorted(rounds.items()):
        taken = [a for a in store.assignments(run.id, number) if a.work == "train" and a.state == "done"]
        assert len(taken) == mode.buffer
        examples = sum(a.examples for a in taken)
        step = sum(a.examples * (1 + a.staleness) ** -mode.staleness.exponent * steps[a.site] for a in taken)
        model = {name: tensor + np.float64(step / examples) for name, tensor in model.items()}
        came = load_file(store.files.path(record.model_digest))
        for name, tensor in model.items():
            np.testing.assert_allclose(came[name], tensor, rtol=2e-6, atol=2e-6)


async def test_a_run_goes_on_if_the_version_that_was_being_made_turns_out_better(
    bench, async_spec, initial, monkeypatch
):
    """One site's measurement of version 1 ends the run, while its own update makes version 2."""
    a, slow = gated(bench, "a"), gated(bench, "slow")
    start = float(initial["layer.bias"].mean())
    a.measure = slow.measure = lambda tensors: {0: 5.0, 1: 6.0}.get(
        round(float(tensors["layer.bias"].mean()) - start), 1.0
    )
    make, goes_on = folding.make_model, threading.Event()

    def make_slowly(store, run, record, centre):
        assert record.number != 2 or goes_on.wait(20)
        return make(store, run, record, centre)

    monkeypatch.setattr(folding, "make_model", make_slowly)
    stop, evaluation = {"patience": {"evaluations": 1}}, {"initial": True, "every_rounds": 1}
    spec = async_spec(buffer=1, rounds=50, evaluation=evaluation, stop=stop, cohort={"min_sites": 2})
    run = await bench.enqueue(spec)
    await let_end(bench, run, a)
    await bench.until(lambda: version(bench, run) == 1)
    await let_end(bench, run, slow)
    await bench.until(lambda: "loss" in bench.running.store.rounds(run.id)[1].metrics)
    goes_on.set()
    free(a)
    free(slow)
    run = await bench.ended(run)
    assert run.reason.endswith("its best is 1 after round 2")
