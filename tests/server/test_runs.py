"""The queue: several runs at once, by priority; pause, resume, stop and clone; what goes wrong is kept."""

import asyncio
import errno
import threading
import time

import numpy as np
import pytest

from fedloom.v1 import session_pb2 as pb
from fedloom_common.errors import BadSpec, BadTensor, NotFound, StorageFull, WrongState
from fedloom_server import folding
from fedloom_server.app import coordinator
from fedloom_server.failures import FAILURES_KEPT
from fedloom_server.folding import Folding
from fedloom_server.records import Failure, Run, RunState
from fedloom_server.store import Store
from fedloom_server.waiting import Wait

TRAIN_ONLY = {"initial": False, "every_rounds": 0}


async def test_runs_beyond_the_limit_go_by_priority_and_then_in_order_of_submission(config, spec, bench_of):
    async with coordinator(config.model_copy(update={"concurrent_runs": 1})) as running:
        bench = bench_of(running)
        blocker = await bench.enqueue(spec(name="blocker"))
        order = [(0, "second"), (0, "third"), (5, "first"), (-1, "last")]
        runs = {name: await bench.enqueue(spec(name=name), priority=priority) for priority, name in order}
        await bench.running.runs.pause(blocker.id, "")
        await bench.in_state(runs["first"], "waiting")
        bench.site("a")
        ended = {name: await bench.ended(run) for name, run in runs.items()}
        assert sorted(ended, key=lambda name: ended[name].started_at_s) == [
            "first",
            "second",
            "third",
            "last",
        ]


async def test_a_run_without_a_place_says_what_it_waits_for(config, spec, bench_of, fault):
    async with coordinator(config.model_copy(update={"concurrent_runs": 1})) as running:
        bench = bench_of(running)
        site = bench.site("a", fault=fault.SILENT)
        first = await bench.enqueue(spec(evaluation=TRAIN_ONLY))
        await bench.until(site.assigned.is_set)
        second = await bench.enqueue(spec())
        text = "waits for one of 1 runs under way to end (concurrent_runs)"
        await bench.until(lambda: running.store.run(second.id).reason == text)
        await running.runs.stop(first.id, "")
        site.fault = fault.NONE
        assert (await bench.ended(second)).reason == "the only round is done"


async def test_a_run_that_waits_for_its_sites_leaves_its_place_to_others(config, spec, bench_of):
    async with coordinator(config.model_copy(update={"concurrent_runs": 1})) as running:
        bench = bench_of(running)
        waiting = await bench.enqueue(spec(data="elsewhere"), priority=9)
        await bench.in_state(waiting, "waiting")
        bench.site("a")
        assert (await bench.ended(await bench.enqueue(spec()))).state == "finished"
        assert running.store.run(waiting.id).state == "waiting"


@pytest.mark.parametrize(
    ("mode", "rounds_done"),
    [
        pytest.param({"kind": "sync"}, 0, id="sync"),
        # a version that is being made is made
        pytest.param({"kind": "async", "buffer": 1}, 1, id="async"),
    ],
)
async def test_a_run_that_is_stopped_again_ends_only_when_its_threads_have(
    bench, spec, monkeypatch, mode, rounds_done
):
    begun, gate, aggregate = threading.Event(), threading.Event(), Folding._aggregate

    def slow(folding, done):
        begun.set()
        gate.wait(60)
        return aggregate(folding, done)

    monkeypatch.setattr(Folding, "_aggregate", slow)
    bench.site("a")
    run = await bench.enqueue(spec(rounds=2, mode=mode, evaluation=TRAIN_ONLY))
    await bench.until(begun.is_set)
    stops = []
    for reason in ("once", "again"):
        stops.append(asyncio.create_task(bench.running.runs.stop(run.id, reason)))
        await asyncio.sleep(0.1)
    assert bench.running.store.run(run.id).state == "running"
    gate.set()
    for stop in stops:
        ended = await stop
        assert (ended.state, ended.reason, ended.rounds_done) == ("stopped", "again", rounds_done)


async def test_runs_on_shared_sites_do_not_disturb_each_other(config, spec, bench_of, initial):
    async with coordinator(config.model_copy(update={"staged_updates": 2})) as running:
        bench = bench_of(running)
        for number in range(3):
            bench.site(f"site-{number}", step=float(number))
        runs = [
            await bench.enqueue(spec(name=f"run-{n}", rounds=4, cohort={"min_sites": 3})) for n in range(3)
        ]
        for run in runs:
            assert (await bench.ended(run, seconds=40)).state == "finished"
            np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 4, rtol=1e-6)
        assert not list(running.store.spool.folder.iterdir())


async def test_stopping_a_run_leaves_what_has_come_for_another(config, spec, bench_of, initial, fault):
    async with coordinator(config.model_copy(update={"staged_updates": 2})) as running:
        bench = bench_of(running)
        for number in range(2):
            bench.site(f"site-{number}", step=3.0)
        slow = bench.site("slow", step=9.0, fault=fault.SILENT)
        cohort = {"min_sites": 3}
        kept = await bench.enqueue(spec(cohort=cohort, evaluation=TRAIN_ONLY))
        stopped = await bench.enqueue(spec(cohort=cohort, evaluation=TRAIN_ONLY))
        for run in (kept, stopped):
            await bench.until(lambda run=run: list(bench.outcomes(run).values()).count(("done", "")) == 2)
        await running.runs.stop(stopped.id, "")
        assert [
            path.name for path in running.store.spool.folder.iterdir() if path.name.startswith(stopped.id)
        ] == []
        await bench.detach("slow")
        slow.fault = fault.NONE
        bench.attach(slow)
        assert (await bench.ended(kept)).state == "finished"
        np.testing.assert_allclose(bench.model(kept)["layer.bias"], initial["layer.bias"] + 5, rtol=1e-6)
        assert [len(bench.sites[f"site-{number}"].trained) for number in range(2)] == [2, 2]


async def test_few_updates_of_each_of_many_runs_do_not_fill_the_disk_for_good(config, spec, bench_of, fault):
    """Three are worth folding at a time; each of three runs has two, and together they take all the room."""
    async with coordinator(config.model_copy(update={"staged_updates": 6})) as running:
        bench = bench_of(running)
        for name in "abcd":
            bench.site(name, fault=fault.NONE if name in "ab" else fault.SILENT)
        cohort = {"min_sites": 4, "stall_s": 60}
        runs = [
            await bench.enqueue(spec(name=f"run-{n}", cohort=cohort, evaluation=TRAIN_ONLY)) for n in range(3)
        ]
        for run in runs:
            await bench.until(lambda run=run: list(bench.outcomes(run).values()).count(("done", "")) == 2)
        for name in "cd":
            await bench.detach(name)
            bench.sites[name].fault = fault.NONE
            bench.attach(bench.sites[name])
        for run in runs:
            assert (await bench.ended(run)).state == "finished"


async def test_a_paused_run_keeps_the_updates_that_have_come_and_goes_on_in_the_same_round(
    config, spec, bench_of, initial, fault
):
    async with coordinator(config) as running:
        bench = bench_of(running)
        done = bench.site("done", step=1.0)
        late = bench.site("late", step=3.0, fault=fault.SILENT)
        run = await bench.enqueue(spec(cohort={"min_sites": 2}, evaluation=TRAIN_ONLY))
        await bench.until(lambda: bench.outcomes(run).get("done") == ("done", "") and late.assigned.is_set())
        paused = await running.runs.pause(run.id, "the grid is busy")
        assert (paused.state, paused.reason) == ("paused", "the grid is busy")
        await bench.until(lambda: late.cancelled)
        assert list(late.cancelled.values()) == ["the run is paused"]
        with pytest.raises(WrongState, match="is paused already"):
            await running.runs.pause(run.id, "")
    late.fault = fault.NONE
    async with coordinator(config) as running:  # a pause survives a restart
        bench.running = running
        bench.attach(done)
        bench.attach(late)
        await bench.until(lambda: len(running.sites.connected()) == 2)
        await asyncio.sleep(0.3)
        assert running.store.run(run.id).state == "paused"
        running.runs.resume(run.id)
        run = await bench.ended(run)
        assert run.state == "finished"
        assert run.paused_s > 0
        assert len(done.trained) == 1
        np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 2, rtol=1e-6)


class Later:
    """The time by which a run's own is measured; it may be set forward."""

    ahead_s = 0.0

    def time(self):
        return time.time() + self.ahead_s


@pytest.fixture
def later(monkeypatch):
    monkeypatch.setattr("fedloom_server.rounds.time", later := Later())
    return later


async def test_a_round_that_outlasts_the_run_s_time_is_finished_after_a_pause(
    bench, spec, initial, later, fault
):
    bench.site("done", step=1.0)
    late = bench.site("late", step=3.0, fault=fault.SILENT)
    short = spec(rounds=50, cohort={"min_sites": 2}, evaluation=TRAIN_ONLY, stop={"wall_s": 600})
    run = await bench.enqueue(short)
    await bench.until(lambda: bench.outcomes(run).get("done") == ("done", "") and late.assigned.is_set())
    later.ahead_s = 601
    await bench.running.runs.pause(run.id, "")
    late.fault = fault.NONE
    bench.running.runs.resume(run.id)
    run = await bench.ended(run)
    assert (run.state, run.rounds_done) == ("finished", 1)
    assert "stop.wall_s" in run.reason
    assert [record.state for record in bench.running.store.rounds(run.id)] == ["finished"]
    np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 2, rtol=1e-6)
    assert list(bench.running.store.spool.folder.iterdir()) == []


async def test_a_round_between_two_tries_does_not_outlast_the_run_s_time(bench, spec, later, fault):
    bench.site("a", fault=fault.FAILS)
    short = spec(rounds=50, cohort={"attempts": 1}, stop={"wall_s": 600})
    run = await bench.enqueue(short)
    await bench.waits(run, "the quorum is 1")
    later.ahead_s = 601
    bench.running.runs.resume(run.id)
    run = await bench.ended(run)
    assert (run.state, run.rounds_done) == ("finished", 0)
    assert [record.state for record in bench.running.store.rounds(run.id)] == ["finished", "failed"]


async def test_a_finished_training_of_a_paused_run_is_asked_for_when_its_site_attaches(
    config, spec, bench_of, fault
):
    async with coordinator(config) as running:
        bench = bench_of(running)
        site = bench.site("a", fault=fault.NEVER_UPLOADS)
        run = await bench.enqueue(spec(evaluation=TRAIN_ONLY))
        await bench.until(lambda: site.granted)
        await running.runs.pause(run.id, "")
        assert not site.cancelled
        await bench.detach("a")
        name = f"{run.id}.1.1.train.a"
        site.open_assignments, site.asked = [name], []
        bench.attach(site)
        await bench.until(lambda: [asked.id for asked in site.asked] == [name])
        site.fault = fault.NONE
        running.runs.resume(run.id)
        assert (await bench.ended(run)).state == "finished"
        assert site.trained == [name]


async def test_a_paused_run_can_be_stopped_and_resumed_from_there(bench, spec, fault):
    site = bench.site("a", fault=fault.SILENT)
    run = await bench.enqueue(spec(evaluation=TRAIN_ONLY))
    await bench.until(site.assigned.is_set)
    await bench.running.runs.pause(run.id, "")
    assert (await bench.running.runs.stop(run.id, "enough")).state == "stopped"
    site.fault = fault.NONE
    bench.running.runs.resume(run.id)
    assert (await bench.ended(run)).state == "finished"


async def test_a_clone_goes_on_from_a_model_of_another_run(bench, spec, initial):
    bench.site("a", step=1.0)
    run = await bench.ended(await bench.enqueue(spec(rounds=3)))
    text = spec(rounds=2, name="clone", local={"steps": 7}).model_dump_json()
    clone = await bench.running.runs.submissions.clone_from_model(run.id, text, 1, priority=3)
    assert (clone.cloned_from, clone.cloned_round, clone.priority) == (run.id, 1, 3)
    clone = await bench.ended(clone)
    np.testing.assert_allclose(bench.model(clone)["layer.bias"], initial["layer.bias"] + 3, rtol=1e-6)
    assert clone.spec.local.steps == 7
    np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 3, rtol=1e-6)


SCAFFOLD = {"steps": 7, "optimizer": {"name": "sgd"}, "algorithm": "scaffold"}


async def test_a_clone_to_scaffold_begins_with_control_variates_of_zero_and_one_from_it_without(
    bench, spec, initial
):
    bench.site("a", step=1.0)
    submissions = bench.running.runs.submissions
    plain = await bench.ended(await bench.enqueue(spec()))
    there = await submissions.clone_from_model(plain.id, spec(local=SCAFFOLD).model_dump_json(), None)
    began = bench.model(there)
    assert began["control/layer.bias"].tolist() == [0] * 4
    np.testing.assert_array_equal(began["layer.bias"], initial["layer.bias"] + 1)
    await bench.ended(there)
    back = await submissions.clone_from_model(there.id, spec().model_dump_json(), None)
    assert set(bench.model(back)) == set(initial)
    np.testing.assert_allclose(bench.model(back)["layer.bias"], initial["layer.bias"] + 2, rtol=1e-6)


async def test_control_variates_move_by_the_cohorts_share_of_the_sites_and_the_model_by_the_mean(
    bench, spec, initial
):
    """Half of four sites, each adding its step to every tensor that came: the server's c moves by half."""
    for number in range(4):
        bench.site(f"site-{number}", step=3.0)
    await bench.until(lambda: len(bench.running.sites.connected()) == 4)
    cohort = {"min_sites": 1, "fraction": 0.5}
    run = await bench.ended(await bench.enqueue(spec(rounds=2, local=SCAFFOLD, cohort=cohort)))
    model = bench.model(run)
    np.testing.assert_allclose(model["layer.bias"], initial["layer.bias"] + 6, rtol=1e-6)
    np.testing.assert_allclose(model["control/layer.weight"], np.full((3, 4), 3.0), rtol=1e-6)
    records = bench.running.store.rounds(run.id)
    assert [record.population for record in records] == [0, 4, 4]
    assert set(records[2].control_weights) == {*records[1].cohort, *records[2].cohort}


async def test_a_clone_from_scaffold_to_scaffold_begins_with_control_variates_of_zero_too(bench, spec):
    """What its sites keep for the run that it comes from is of no use to it."""
    bench.site("a", step=1.0)
    run = await bench.ended(await bench.enqueue(spec(local=SCAFFOLD)))
    assert bench.model(run)["control/layer.bias"].tolist() == [1] * 4
    submissions = bench.running.runs.submissions
    clone = await submissions.clone_from_model(run.id, spec(local=SCAFFOLD).model_dump_json(), None)
    assert bench.model(clone)["control/layer.bias"].tolist() == [0] * 4
    np.testing.assert_array_equal(bench.model(clone)["layer.bias"], bench.model(run)["layer.bias"])


async def test_a_clone_from_a_model_is_refused_another_model_or_round(bench, spec):
    bench.site("a")
    run = await bench.ended(await bench.enqueue(spec()))
    other = spec(model={"config": {"model_type": "llama"}}).model_dump_json()
    with pytest.raises(BadSpec, match="model differs from that of run"):
        await bench.running.runs.submissions.clone_from_model(run.id, other, None)
    masked = spec(task={"kind": "masked_lm"}).model_dump_json()
    with pytest.raises(BadSpec, match="task needs another kind of model than that of run"):
        await bench.running.runs.submissions.clone_from_model(run.id, masked, None)
    with pytest.raises(NotFound, match="has no model of round 8; it has 0, 1"):
        await bench.running.runs.submissions.clone_from_model(run.id, spec().model_dump_json(), 8)


async def test_each_failure_is_kept_with_its_site_cause_and_last_lines(bench, spec, fault):
    bench.site("good")
    bad = bench.site("bad", fault=fault.SILENT)
    run = await bench.enqueue(spec(cohort={"min_sites": 2, "attempts": 1}, evaluation=TRAIN_ONLY))
    await bench.until(bad.assigned.is_set)
    reason = "OutOfMemoryError: 3 GB wanted\n" + "\n".join(f"line {n}" for n in range(60))
    bad.send(failure=pb.Failure(assignment_id=f"{run.id}.1.1.train.bad", reason=reason))
    await bench.waits(run, "reported")
    first, attempt, wait = bench.running.store.failures(run.id)
    assert (first.site, first.round, first.attempt, first.cause) == ("bad", 1, 1, "failed")
    assert first.message == "OutOfMemoryError: 3 GB wanted"
    assert first.log.splitlines() == [f"line {n}" for n in range(20, 60)]
    assert (attempt.site, attempt.round, attempt.cause) == ("", 1, "attempt failed")
    assert wait.cause == "waiting"


def test_only_the_newest_failures_of_a_run_are_kept(tmp_path, spec):
    store = Store(tmp_path)
    for name in ("mine", "other"):
        store.save(
            Run(
                id=name, name=name, spec_json=spec().model_dump_json(), state=RunState.RUNNING,
                submitted_at_s=1.0, assets=[], model_digest="", model_bytes=0,
            )
        )  # fmt: skip
        store.save(
            *(Failure(id=f"{name}{n}", run_id=name, at_s=n, cause="lost", message="") for n in range(9))
        )
    store.trim_failures("mine", 4)
    assert [failure.id for failure in store.failures("mine")] == ["mine5", "mine6", "mine7", "mine8"]
    assert len(store.failures("other")) == 9
    store.close()


@pytest.mark.parametrize("mode", [{"kind": "sync"}, {"kind": "async", "buffer": 1}])
async def test_a_run_whose_rounds_all_succeed_keeps_only_the_newest_failures_too(bench, spec, mode):
    run, store = await bench.enqueue(spec(mode=mode, evaluation=TRAIN_ONLY)), bench.running.store
    numbers = range(FAILURES_KEPT + 3)
    store.save(*(Failure(id=str(n), run_id=run.id, at_s=n, cause="failed", message="") for n in numbers))
    bench.site("a")
    assert (await bench.ended(run)).state == "finished"
    assert [failure.id for failure in store.failures(run.id)] == [str(n) for n in numbers[3:]]


# Sessions are told apart by the objects that stand for them.


def test_a_wait_for_sites_ends_as_soon_as_they_are_enough():
    wait = Wait(min_sites=2, sessions={}, failures=0, now_s=0.0)
    assert not wait.is_over({"a": object()}, 1e9)
    assert wait.is_over({"a": object(), "b": object()}, 0.0)


def test_a_wait_after_a_failure_ends_with_a_new_session_but_not_at_once():
    known = {"a": object()}
    wait = Wait(min_sites=1, sessions=known, failures=1, now_s=100.0)
    assert not wait.is_over({"a": object()}, 101.9)
    assert wait.is_over({"a": object()}, 102.0)
    assert not wait.is_over(known, 119.9)
    assert wait.is_over(known, 120.0)


@pytest.mark.parametrize(("failures", "pause_s"), [(1, 2), (2, 4), (5, 32), (6, 60), (1000, 60)])
def test_a_wait_lasts_longer_with_each_failure_in_a_row(failures, pause_s):
    wait = Wait(min_sites=1, sessions={}, failures=failures, now_s=0.0)
    assert not wait.is_over({"a": object()}, pause_s - 0.1)
    assert wait.is_over({"a": object()}, pause_s)


async def test_a_round_that_asks_more_sites_goes_on_with_as_many_updates_as_it_wants(
    bench, spec, initial, fault
):
    for name in "abc":
        bench.site(name, step=2.0)
    slow = bench.site("slow", step=90.0, fault=fault.SILENT)
    cohort = {"min_sites": 3, "quorum": 2, "over_select": 0.34, "fraction": 0.5, "stall_s": 60}
    await bench.until(lambda: len(bench.running.sites.connected()) == 4)  # of three it would want them all
    run = await bench.ended(await bench.enqueue(spec(cohort=cohort, evaluation=TRAIN_ONLY)))
    (record,) = bench.running.store.rounds(run.id)
    assert (record.target, len(record.cohort)) == (3, 4)
    np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 2, rtol=1e-6)
    await bench.until(lambda: slow.cancelled)
    assert bench.outcomes(run)["slow"] == ("cancelled", "3 results have come, and no more are waited for")
    assert bench.running.store.failures(run.id) == []


async def test_a_late_update_joins_the_next_round_as_a_change_of_its_own_base(bench, spec, initial, clock):
    """By hand: round 1 takes a alone; round 2 takes a, and what slow made of the first model."""
    a, slow = bench.site("a", step=1.0, examples=10), bench.site("slow", step=8.0, examples=30)
    a.gate, slow.gate = asyncio.Semaphore(1), asyncio.Semaphore(0)
    staleness = {"exponent": 1.0}
    cohort = {"min_sites": 2, "quorum": 1, "deadline_s": 0.3, "late": "carry", "staleness": staleness}
    run = await bench.enqueue(spec(rounds=2, cohort=cohort, evaluation=TRAIN_ONLY))
    await bench.until(lambda: bench.outcomes(run).get("a") == ("done", "") and slow.asked)
    clock.now_s += 0.31
    await bench.until(lambda: bench.running.store.run(run.id).rounds_done == 1)
    name = f"{run.id}.1.1.train.slow"
    assert [asked.id for asked in slow.asked] == [name]
    assert not slow.cancelled
    slow.gate.release()
    await bench.until(lambda: bench.running.store.assignment(name).state == "done")
    a.gate.release()
    run = await bench.ended(run)
    assert run.state == "finished"
    late = bench.running.store.assignment(name)
    assert (late.round, late.staleness, late.is_late) == (2, 1, False)
    wanted = initial["layer.bias"] + 1 + (10 * 1.0 + 30 * 0.5 * 8.0) / 40
    np.testing.assert_allclose(bench.model(run)["layer.bias"], wanted, rtol=1e-6)


@pytest.mark.parametrize("then", ["ends", "is paused"])
async def test_a_late_update_that_no_round_takes_leaves_its_room_to_other_runs(
    config, bench_of, spec, clock, then
):
    async with coordinator(config.model_copy(update={"staged_updates": 1})) as running:
        bench = bench_of(running)
        a, slow = bench.site("a"), bench.site("slow")
        slow.gate, a.evaluate_gate = asyncio.Semaphore(0), asyncio.Event()
        cohort = {"min_sites": 2, "quorum": 1, "deadline_s": 0.3, "late": "carry"}
        run = await bench.enqueue(spec(cohort=cohort, evaluation={"initial": False}))
        await bench.until(lambda: bench.outcomes(run).get("a") == ("done", "") and slow.asked)
        clock.now_s += 0.31
        await bench.until(lambda: bench.running.store.rounds(run.id)[0].state == "evaluating")
        slow.gate.release()
        await bench.until(lambda: bench.outcomes(run)["slow"] == ("done", ""))
        if then == "is paused":
            await running.runs.pause(run.id, "")
        a.evaluate_gate.set()
        if then == "ends":
            assert (await bench.ended(run)).state == "finished"
        slow.gate = None
        other = await bench.enqueue(spec(cohort={"min_sites": 2}))
        assert (await bench.ended(other)).state == "finished"


@pytest.mark.parametrize("comes", ["before", "during"])
async def test_late_updates_of_a_run_that_waits_leave_their_room_to_other_runs_and_count_when_it_goes_on(
    config, bench_of, spec, clock, monkeypatch, comes
):
    monkeypatch.setattr("fedloom_server.sites.RETURN_S", 0.0)
    async with coordinator(config.model_copy(update={"staged_updates": 1})) as running:
        bench = bench_of(running)
        a, slow = bench.site("a"), bench.site("slow")
        bench.site("leaves")
        slow.gate, a.evaluate_gate = asyncio.Semaphore(0), asyncio.Event()
        cohort = {
            "min_sites": 3,
            "quorum": 1,
            "deadline_s": 0.3,
            "late": "carry",
            "staleness": {"exponent": 0},
        }
        run = await bench.enqueue(spec(rounds=2, cohort=cohort, evaluation={"initial": False}))
        await bench.until(lambda: list(bench.outcomes(run).values()).count(("done", "")) == 2 and slow.asked)
        clock.now_s += 0.31
        await bench.until(lambda: running.store.rounds(run.id)[0].state == "evaluating")
        if comes == "before":
            slow.gate.release()
            await bench.until(lambda: bench.outcomes(run)["slow"] == ("done", ""))
        measured = f"{run.id}.1.1.evaluate.leaves"
        await bench.until(lambda: running.store.assignment(measured).state == "done")
        await bench.detach("leaves")
        a.evaluate_gate.set()
        await bench.waits(run, "waits for sites")
        for _ in range(9):
            slow.gate.release()
        other = await bench.enqueue(spec(cohort={"min_sites": 2}))
        assert (await bench.ended(other)).state == "finished"
        a.gate = asyncio.Semaphore(0)  # round 2 must not end without the late update
        bench.attach(bench.sites["leaves"])
        late = f"{run.id}.1.1.train.slow"
        await bench.until(lambda: running.store.assignment(late).state == "done")
        a.gate.release()
        assert (await bench.ended(run)).state == "finished"
        assert (running.store.assignment(late).round, running.store.assignment(late).staleness) == (2, 1)


async def test_a_late_update_that_came_too_late_between_two_rounds_leaves_its_room(
    config, bench_of, spec, clock
):
    async with coordinator(config.model_copy(update={"staged_updates": 1})) as running:
        bench = bench_of(running)
        a, slow = bench.site("a"), bench.site("slow")
        slow.gate, a.evaluate_gate = asyncio.Semaphore(0), asyncio.Event()
        cohort = {"min_sites": 2, "quorum": 1, "deadline_s": 0.3, "late": "carry", "staleness": {"max": 1}}
        evaluation = {"initial": False, "every_rounds": 2}
        run = await bench.enqueue(spec(rounds=3, cohort=cohort, evaluation=evaluation))
        await bench.until(lambda: bench.outcomes(run).get("a") == ("done", "") and slow.asked)
        clock.now_s += 0.31
        name = f"{run.id}.1.1.train.slow"
        await bench.until(lambda: [r.state for r in running.store.rounds(run.id)][1:] == ["evaluating"])
        slow.gate.release()
        await bench.until(lambda: running.store.assignment(name).state == "done")
        slow.gate = None
        a.evaluate_gate.set()
        run = await bench.ended(run)
        assert (run.state, running.store.assignment(name).state) == ("finished", "lost")
        assert "2 rounds late, cohort.staleness.max is 1" in running.store.assignment(name).reason


async def test_work_that_waits_at_its_site_is_alive_as_long_as_what_it_waits_for(
    bench, spec, clock, told, fault
):
    """Both runs give a site up after 0.2 s of silence; what it does first makes progress for 0.45."""
    site = bench.site("a", fault=fault.SILENT)
    cohort = {"stall_s": 0.2, "attempts": 1}
    runs = [await bench.enqueue(spec(name=f"run-{n}", cohort=cohort, evaluation=TRAIN_ONLY)) for n in "12"]
    await bench.until(lambda: len(site.asked) == 2)
    first, queued = (f"{run.id}.1.1.train.a" for run in runs)
    site.send(progress=pb.Progress(assignment_id=queued, phase=pb.PHASE_QUEUED))
    await bench.until(lambda: told)
    for step in range(3):
        clock.now_s += 0.15
        site.send(progress=pb.Progress(assignment_id=first, phase=pb.PHASE_TRAIN, done=step))
        await bench.until(lambda step=step: told[-1].done == step and told[-1].phase == "train")
    await asyncio.sleep(0.5)  # the silent would be lost
    store = bench.running.store
    assert [store.assignment(name).state for name in (first, queued)] == ["open", "open"]
    clock.now_s += 0.25
    reason = (await bench.waits(runs[0], "reported")).reason
    assert "no progress for 0.2 s; last seen in train, 2 of ? done" in reason
    clock.now_s += 0.25
    reason = (await bench.waits(runs[1], "reported")).reason
    assert "no progress for 0.2 s; last seen in queued" in reason


@pytest.mark.parametrize(
    ("staged_updates", "comes", "step"),
    [
        # a +1 of 10 examples, b +4 of 30; slow +8 of 20, a round late, so half of it counts
        pytest.param(16, "after the failure", (10 * 1 + 30 * 4 + 20 * 4) / 60, id="at-work"),
        # slow is free, and in the second try's cohort besides
        pytest.param(16, "before", (10 * 1 + 30 * 4 + 20 * 4 + 20 * 8) / 80, id="on-disk"),
        # the sum of the first try is gone, so slow is asked for its update again
        pytest.param(2, "before", (10 * 1 + 30 * 4 + 20 * 4) / 60, id="folded"),
    ],
)
async def test_a_late_update_outlives_a_failed_try(
    config, bench_of, spec, initial, clock, monkeypatch, staged_updates, comes, step
):
    monkeypatch.setattr("fedloom_server.rounds.ATTEMPT_PAUSE_S", 0.1)
    async with coordinator(config.model_copy(update={"staged_updates": staged_updates})) as running:
        bench, store = bench_of(running), running.store
        a, b = bench.site("a", step=1.0, examples=10), bench.site("b", step=4.0, examples=30)
        slow = bench.site("slow", step=8.0, examples=20)
        a.gate, b.gate, slow.gate = asyncio.Semaphore(1), asyncio.Semaphore(1), asyncio.Semaphore(0)
        cohort = {"min_sites": 3, "quorum": 2, "deadline_s": 0.4, "late": "carry", "attempts": 5}
        cohort["staleness"] = {"exponent": 1.0}
        run = await bench.enqueue(spec(rounds=2, cohort=cohort, evaluation=TRAIN_ONLY))
        await bench.until(lambda: list(bench.outcomes(run).values()).count(("done", "")) == 2 and slow.asked)
        clock.now_s += 0.41
        await bench.until(lambda: any(asked.round == 2 for asked in a.asked))
        await bench.until(lambda: any(asked.round == 2 for asked in b.asked))
        late = f"{run.id}.1.1.train.slow"
        if comes == "before":
            slow.gate.release()
            await bench.until(lambda: store.assignment(late).state == "done")
            await bench.until(lambda: store.assignment(late).is_folded == (staged_updates == 2))
        for site in (a, b):
            site.send(failure=pb.Failure(assignment_id=site.asked[-1].id, reason="out of memory"))
        await bench.until(lambda: store.rounds(run.id)[-1].attempt == 2 and store.rounds(run.id)[-1].cohort)
        slow.gate.release()
        await bench.until(lambda: store.assignment(late).state == "done")
        for site in (a, a, b, b, slow):  # each of a and b still has the training that failed before its gate
            site.gate.release()
        run = await bench.ended(run)
        assert run.state == "finished"
        row = store.assignment(late)
        assert (row.state, row.round, row.attempt, row.staleness, row.is_late) == ("done", 2, 2, 1, False)
        wanted = initial["layer.bias"] + (10 * 1 + 30 * 4) / 40 + step
        np.testing.assert_allclose(bench.model(run)["layer.bias"], wanted, rtol=1e-6)
        assert len(slow.trained) == (2 if step > 4 else 1)


@pytest.mark.parametrize("has_site", [False, True])
async def test_a_stop_that_comes_as_a_run_begins_is_heard(bench, spec, has_site):
    """Before its task has run, or when it has just found that no site is there."""
    if has_site:
        bench.site("a")
        await bench.until(bench.running.sites.connected)
    runs = bench.running.runs
    begin, stopped = runs._begin, []

    def begin_and_stop(run):
        begin(run)
        if not stopped:
            stopped.append(asyncio.create_task(runs.stop(run.id, "at once")))

    runs._begin = begin_and_stop
    run = await bench.enqueue(spec(rounds=3))
    await bench.until(lambda: stopped)
    await stopped[0]
    assert bench.running.store.run(run.id).state == "stopped"


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        pytest.param(BadTensor("the next model's tensor w is not finite in F32"), 2, id="no-model"),
        pytest.param(OSError(errno.EIO, "Input/output error"), 1, id="disk"),
        pytest.param(MemoryError(), 1, id="memory"),
    ],
)
async def test_a_run_that_failed_while_it_aggregated_trains_again_only_if_its_updates_make_no_model(
    bench, spec, monkeypatch, initial, error, attempts
):
    site = bench.site("a")
    make = folding.make_model

    def fail(*arguments):
        monkeypatch.setattr(folding, "make_model", make)
        raise error

    monkeypatch.setattr(folding, "make_model", fail)
    run = await bench.ended(await bench.enqueue(spec(rounds=1)))
    assert run.state == "failed"
    bench.running.runs.resume(run.id)
    run = await bench.ended(run)
    assert run.state == "finished"
    assert bench.running.store.round(run.id, 1).attempt == len(site.trained) == attempts
    np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 1, rtol=1e-6)


@pytest.fixture
def no_end_can_be_written(bench, monkeypatch):
    """Until it is called."""
    store, save = bench.running.store, bench.running.store.save

    def save_no_end(*records):
        if any(getattr(record, "state", "") == "stopped" for record in records):
            raise StorageFull("no space left for the database")
        save(*records)

    monkeypatch.setattr(store, "save", save_no_end)
    return lambda: monkeypatch.setattr(store, "save", save)


async def test_a_stop_that_cannot_be_written_is_told_to_who_asked_for_it(bench, spec, no_end_can_be_written):
    bench.site("a").gate = asyncio.Semaphore(0)
    run = await bench.enqueue(spec(rounds=3))
    await bench.until(lambda: bench.sites["a"].asked)
    with pytest.raises(StorageFull, match="no space left for the database"):
        await bench.running.runs.stop(run.id, "enough")
    assert bench.running.store.run(run.id).state == "running"
    no_end_can_be_written()
    assert (await bench.running.runs.stop(run.id, "enough")).state == "stopped"


async def test_a_stop_that_cannot_be_written_as_a_run_begins_to_wait_is_told_too(
    bench, spec, no_end_can_be_written
):
    runs = bench.running.runs
    wait, stopped = runs._wait, []

    def wait_and_stop(run, error):
        wait(run, error)
        stopped.append(asyncio.create_task(runs.stop(run.id, "at once")))

    runs._wait = wait_and_stop
    run = await bench.enqueue(spec())
    await bench.until(lambda: stopped)
    with pytest.raises(StorageFull, match="no space left for the database"):
        await stopped[0]
    assert bench.running.store.run(run.id).state == "waiting"
    no_end_can_be_written()
    assert (await runs.stop(run.id, "enough")).state == "stopped"


async def test_a_resume_that_comes_as_a_run_pauses_is_not_undone(bench, spec, monkeypatch):
    site = bench.site("a")
    site.gate = asyncio.Semaphore(0)
    run = await bench.enqueue(spec())
    await bench.until(lambda: site.asked)
    runs, leave = bench.running.runs, bench.running.runs._leave

    def leave_and_resume(left, *how):
        leave(left, *how)
        monkeypatch.setattr(runs, "_leave", leave)
        asyncio.get_running_loop().call_soon(runs.resume, left.id)

    monkeypatch.setattr(runs, "_leave", leave_and_resume)
    assert (await runs.pause(run.id, "for a moment")).state == "queued"
    site.gate.release()
    site.gate.release()
    assert (await bench.ended(run)).state == "finished"
