"""Models that are measured by those who train from them (evaluation.when: before_training)."""

import asyncio

import numpy as np
import pytest

from fedloom_server.app import coordinator
from fedloom_server.evaluation import before_of


def before(**changes):
    return {"when": "before_training"} | changes


def losses(bench, run):
    """Held-out loss by round; None where there is none."""
    return {record.number: record.metrics.get("loss") for record in bench.running.store.rounds(run.id)}


def by_hand(bench, run, initial, number):
    """The fake sites' loss of a round's model, which steps of 1 have led to."""
    mean = np.mean([tensor.mean() for tensor in initial.values()])
    return 10.0 - (mean + number)


def works(bench, run, work):
    return [a for a in bench.running.store.assignments(run.id) if a.work == work]


async def test_each_model_is_measured_by_those_who_train_from_it_and_the_last_for_itself(
    bench, spec, initial
):
    bench.site("a")
    bench.site("b")
    run = await bench.ended(await bench.enqueue(spec(rounds=3, cohort={"min_sites": 2}, evaluation=before())))
    assert (run.state, run.reason) == ("finished", "all 3 rounds are done")
    for number, loss in losses(bench, run).items():
        assert loss == pytest.approx(by_hand(bench, run, initial, number), rel=1e-6)
    assert {(a.round, a.site) for a in works(bench, run, "evaluate")} == {(3, "a"), (3, "b")}
    assert [before_of(a).examples for a in works(bench, run, "train")] == [10] * 6


async def test_models_that_are_not_due_are_not_measured(bench, spec):
    bench.site("a")
    wanted = spec(rounds=5, evaluation=before(every_rounds=2, initial=False))
    run = await bench.ended(await bench.enqueue(wanted))
    measured = [number for number, loss in losses(bench, run).items() if loss is not None]
    assert measured == [2, 4, 5]
    assert [a.measures for a in works(bench, run, "train")] == [False, False, True, False, True]


async def test_no_model_is_measured_if_none_is_to_be(bench, spec):
    bench.site("a")
    wanted = spec(rounds=2, evaluation=before(every_rounds=0))
    run = await bench.ended(await bench.enqueue(wanted))
    assert set(losses(bench, run).values()) == {None}
    assert not works(bench, run, "evaluate")


async def test_the_metrics_are_those_over_all_sites_data(bench, spec):
    small, large = bench.site("small", examples=10), bench.site("large", examples=30)
    small.measure, large.measure = lambda tensors: 1.0, lambda tensors: 3.0
    wanted = spec(rounds=1, cohort={"min_sites": 2}, evaluation=before())
    run = await bench.ended(await bench.enqueue(wanted))
    # each fake site counts ten tokens, and the loss is a mean over tokens
    assert losses(bench, run) == {0: 2.0, 1: 2.0}


async def test_a_target_that_the_model_before_reached_ends_the_run_with_the_newest_measured(bench, spec):
    site = bench.site("a")
    seen = iter([5.0, 1.0, 4.0, 0.5])
    site.measure = lambda tensors: next(seen)
    stop = {"target": {"metric": "loss", "value": 2.0}}
    run = await bench.ended(await bench.enqueue(spec(rounds=50, stop=stop, evaluation=before())))
    assert run.reason == "loss is 1 after round 1, at or below the target of 2"
    assert losses(bench, run) == {0: 5.0, 1: 1.0, 2: 4.0}


async def test_patience_goes_on_if_the_last_model_turns_out_better(bench, spec):
    site = bench.site("a")
    seen = iter([5.0, 6.0, 4.0, 4.5, 4.6, 4.7])
    site.measure = lambda tensors: next(seen)
    stop = {"patience": {"evaluations": 1}}
    run = await bench.ended(await bench.enqueue(spec(rounds=50, stop=stop, evaluation=before())))
    # the initial model has 5, round 1's 6, which training round 2 tells: then round 2's is measured, with 4
    assert losses(bench, run) == {0: 5.0, 1: 6.0, 2: 4.0, 3: 4.5, 4: 4.6}
    assert run.reason == "loss has not improved in 2 evaluations in a row; its best is 4 after round 2"
    assert [a.measures for a in works(bench, run, "train")] == [True, True, False, True]


async def test_a_run_that_ends_between_two_evaluations_has_its_last_model_measured(bench, spec):
    site = bench.site("a")
    stop = {"target": {"metric": "train_loss", "value": 100.0}}
    evaluation = {"when": "after_round", "every_rounds": 5, "initial": False}
    run = await bench.ended(await bench.enqueue(spec(rounds=100, stop=stop, evaluation=evaluation)))
    assert (run.state, run.rounds_done) == ("finished", 1)
    assert losses(bench, run)[1] is not None
    assert [(a.round, a.site) for a in works(bench, run, "evaluate")] == [(1, site.name)]


async def test_a_model_that_was_measured_after_its_round_is_not_measured_again(bench, spec):
    bench.site("a")
    evaluation = {"when": "after_round", "every_rounds": 1, "initial": False}
    run = await bench.ended(await bench.enqueue(spec(rounds=2, evaluation=evaluation)))
    assert [a.round for a in works(bench, run, "evaluate")] == [1, 2]


async def test_a_late_update_tells_of_the_older_model_that_its_site_measured(bench, spec, clock):
    fast, slow = bench.site("fast"), bench.site("slow")
    slow.measure = lambda tensors: 100.0
    fast.gate, slow.gate = asyncio.Semaphore(1), asyncio.Semaphore(0)
    cohort = {"min_sites": 2, "quorum": 1, "deadline_s": 1, "late": "carry"}
    run = await bench.enqueue(spec(rounds=3, cohort=cohort, evaluation=before()))
    await bench.until(lambda: bench.outcomes(run).get("fast") == ("done", "") and slow.asked)
    clock.now_s += 1.1
    await bench.until(lambda: bench.running.store.run(run.id).rounds_done == 1)
    assert losses(bench, run)[0] < 11  # of the fast site alone
    slow.gate.release()
    await bench.until(lambda: bench.running.store.assignment(slow.asked[0].id).state == "done")
    for site in (fast, fast, slow, slow):
        site.gate.release()
    run = await bench.ended(run)
    late = [a for a in works(bench, run, "train") if a.staleness]
    assert [(a.site, a.base_round) for a in late] == [("slow", 0)]
    assert losses(bench, run)[0] > 50  # the mean of both


async def test_a_site_that_measures_nothing_trains_all_the_same(bench, spec, clock, fault):
    bench.site("a", fault=fault.NEVER_EVALUATES)
    bench.site("b")
    wanted = spec(rounds=2, cohort={"min_sites": 2, "stall_s": 1}, evaluation=before(deadline_s=1))
    run = await bench.enqueue(wanted)
    await bench.until(lambda: [a.site for a in works(bench, run, "evaluate") if a.state == "done"] == ["b"])
    clock.now_s += 1.1
    run = await bench.ended(run)
    assert [a.state for a in works(bench, run, "train")] == ["done"] * 4
    assert all(loss is not None for loss in losses(bench, run).values())


async def test_what_a_site_says_of_the_model_is_held_against_its_data(bench, spec):
    liar = bench.site("liar")
    good = bench.site("good")
    liar.examples = 2_000_000  # of a data set with a million bytes
    wanted = spec(
        cohort={"min_sites": 2, "quorum": 1}, evaluation=before(), local={"epochs": 1, "batch_examples": 1}
    )
    run = await bench.ended(await bench.enqueue(wanted))
    assert bench.outcomes(run)["liar"][0] == "rejected"
    assert "of the model that it began from it claims 2000000 examples" in bench.outcomes(run)["liar"][1]
    assert losses(bench, run)[0] is not None
    assert good.receipts


async def test_a_restart_while_the_last_model_is_measured_measures_it(config, bench_of, spec):
    wanted = spec(rounds=1, evaluation=before(initial=False))
    async with coordinator(config) as running:
        bench = bench_of(running)
        site = bench.site("a")
        site.measure = lambda tensors: 1.5
        site.fault = type(site.fault).NEVER_EVALUATES
        run = await bench.enqueue(wanted)
        await bench.until(lambda: works(bench, run, "evaluate"))
        await bench.detach("a")
    async with coordinator(config) as running:
        bench = bench_of(running)
        site.fault = type(site.fault).NONE
        bench.attach(site)
        run = await bench.ended(run)
        assert losses(bench, run) == {1: 1.5}


async def test_an_asynchronous_run_learns_of_its_versions_from_those_who_train(bench, spec, initial):
    bench.site("a")
    wanted = spec(rounds=3, mode={"kind": "async", "buffer": 1}, evaluation=before())
    run = await bench.ended(await bench.enqueue(wanted))
    assert run.state == "finished"
    known = losses(bench, run)
    assert set(known) == {0, 1, 2, 3}
    assert known[0] == pytest.approx(by_hand(bench, run, initial, 0), rel=1e-6)
    assert known[3] == pytest.approx(by_hand(bench, run, initial, 3), rel=1e-6)
    assert {a.round for a in works(bench, run, "evaluate")} == {3}


async def test_an_asynchronous_run_that_ends_early_has_its_last_version_measured(bench, spec):
    site = bench.site("a")
    site.seconds = 0.05
    stop = {"target": {"metric": "loss", "value": 8.0}}
    wanted = spec(rounds=50, mode={"kind": "async", "buffer": 1}, evaluation=before(), stop=stop)
    run = await bench.ended(await bench.enqueue(wanted))
    assert run.reason.startswith("loss is ")
    assert run.rounds_done < 10
    assert losses(bench, run)[run.rounds_done] is not None


@pytest.mark.parametrize("every_rounds", [1, 5])
async def test_an_asynchronous_run_that_measures_after_its_versions_measures_its_last(
    bench, spec, every_rounds
):
    bench.site("a")
    stop = {"target": {"metric": "train_loss", "value": 100.0}}
    evaluation = {"when": "after_round", "every_rounds": every_rounds, "initial": False}
    mode = {"kind": "async", "buffer": 1}
    run = await bench.ended(await bench.enqueue(spec(rounds=50, mode=mode, evaluation=evaluation, stop=stop)))
    assert run.reason.startswith("train_loss is ")
    assert losses(bench, run)[run.rounds_done] is not None
