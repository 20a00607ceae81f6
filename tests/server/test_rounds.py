import asyncio
import re
import sqlite3

import numpy as np
import pytest

from fedloom_common.errors import Unreachable, WrongState
from fedloom_common.transfer import upload
from fedloom_server.app import coordinator
from fedloom_server.config import KeepModels
from fedloom_server.store import Store


async def test_the_new_model_is_the_weighted_mean_of_the_updates(bench, spec, initial):
    bench.site("a", step=1.0, examples=10)
    bench.site("b", step=4.0, examples=30)
    bench.site("c", step=-2.5, examples=60)
    run = await bench.ended(await bench.enqueue(spec(cohort={"min_sites": 3})))
    assert (run.state, run.rounds_done) == ("finished", 1)
    for name, tensor in bench.model(run).items():
        start = initial[name]
        updates = [start + np.float32(step) for step in (1.0, 4.0, -2.5)]
        mean = np.average(np.float64(updates), axis=0, weights=[10, 30, 60])
        np.testing.assert_array_max_ulp(tensor, mean.astype(np.float32), maxulp=1)


async def test_rounds_build_on_each_other_until_the_stop_condition(bench, spec, initial):
    bench.site("a", step=1.0)
    bench.site("b", step=2.0)
    run = await bench.ended(await bench.enqueue(spec(rounds=3, cohort={"min_sites": 2})))
    assert run.reason == "all 3 rounds are done"
    np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 4.5, rtol=1e-6)
    rounds = bench.running.store.rounds(run.id)
    assert [record.number for record in rounds] == [0, 1, 2, 3]
    losses = [record.metrics["loss"] for record in rounds]
    assert losses == sorted(losses, reverse=True)
    assert rounds[1].metrics["train_loss"] == 2.5


async def test_a_target_metric_ends_the_run_early(bench, spec):
    bench.site("a", step=1.0)
    stop = {"target": {"metric": "loss", "value": 8.0}}
    run = await bench.ended(await bench.enqueue(spec(rounds=50, stop=stop)))
    assert run.state == "finished"
    assert run.rounds_done < 5
    assert "loss" in run.reason


BAD_UPDATES = {
    "NAN": ("rejected", "layer.weight"),
    "MISSING_TENSOR": ("rejected", "layer.bias is missing"),
    "SURPLUS_TENSOR": ("rejected", "layer.extra"),
    "WRONG_SHAPE": ("rejected", "layer.bias has shape [1], wanted [4]"),
    "WRONG_DTYPE": ("rejected", "layer.bias has dtype F64, wanted F32"),
    "NOT_SAFETENSORS": ("rejected", "not a safetensors file"),
    "NO_EXAMPLES": ("rejected", "0 examples"),
    "TOO_MANY_EXAMPLES": ("rejected", "1000000000000 examples"),
    "NO_DIGEST": ("rejected", "its update's digest is ''"),
    "TOO_LARGE": ("rejected", "bytes, the model has"),
    "REFUSES": ("refused", "policy permits nothing"),
    "FAILS": ("failed", "ValueError: no such file"),
    "SILENT": ("lost", "no progress for 0.2 s"),
    "CORRUPT_CHUNK": ("lost", "is corrupt: its CRC-32C is"),
    "WRONG_DIGEST": ("lost", "wanted blake3:000000"),
}


@pytest.mark.parametrize("name", BAD_UPDATES)
async def test_a_round_goes_on_without_a_site_that_fails(bench, spec, initial, clock, fault, name):
    bench.site("good", step=2.0)
    bad = bench.site("bad", step=100.0, fault=fault[name])
    cohort = {"min_sites": 2, "quorum": 1, "stall_s": 0.2}
    run = await bench.enqueue(spec(cohort=cohort))
    await bench.until(lambda: bench.outcomes(run).get("good") == ("done", ""))
    await bench.until(lambda: bad.errors or name == "SILENT" or bench.outcomes(run)["bad"][0] != "open")
    clock.now_s += 0.3
    run = await bench.ended(run)
    assert run.state == "finished"
    np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 2, rtol=1e-6)
    outcomes = bench.outcomes(run)
    assert outcomes["good"] == ("done", "")
    state, reason = BAD_UPDATES[name]
    assert outcomes["bad"][0] == state
    assert reason in outcomes["bad"][1]
    assert not bad.receipts
    assert not list(bench.running.store.spool.folder.iterdir())


async def test_too_few_updates_keep_the_model_and_let_the_run_wait(bench, spec, initial, fault):
    bench.site("a")
    bench.site("b", fault=fault.NAN)
    run = await bench.enqueue(spec(cohort={"min_sites": 2, "attempts": 2}))
    run = await bench.waits(run, "reported")
    # the other site's result may be given up before it comes, as it is of no more use
    assert re.search(r"[01] of 2 sites reported, the quorum is 2 \(b rejected: ", run.reason)
    assert "goes on when a site attaches again, or after 20 s" in run.reason
    np.testing.assert_array_equal(bench.model(run)["layer.bias"], initial["layer.bias"])
    assert {a.attempt for a in bench.running.store.assignments(run.id, 1)} == {1, 2}


async def test_a_waiting_run_goes_on_when_its_site_is_back(bench, spec, fault):
    bad = bench.site("a", fault=fault.FAILS)
    run = await bench.waits(await bench.enqueue(spec(cohort={"attempts": 1})), "reported")
    bad.fault = fault.NONE
    await bench.detach("a")
    bench.attach(bad)
    run = await bench.ended(run)
    assert (run.state, run.rounds_done) == ("finished", 1)


async def test_a_waiting_run_goes_on_at_once_after_resume(bench, spec, fault):
    bad = bench.site("a", fault=fault.FAILS)
    run = await bench.waits(await bench.enqueue(spec(cohort={"attempts": 1})), "reported")
    bad.fault = fault.NONE
    bench.running.runs.resume(run.id)
    run = await bench.ended(run)
    assert (run.state, run.rounds_done) == ("finished", 1)


async def test_a_site_that_repeats_itself_is_not_alive(bench, spec, clock, told, fault):
    bench.site("hung", fault=fault.REPEATS_ITSELF)
    run = await bench.enqueue(spec(cohort={"stall_s": 1, "attempts": 1}, evaluation={"initial": False}))
    await bench.until(lambda: told)
    clock.now_s += 0.9
    told.clear()
    await bench.until(lambda: len(told) > 2)
    clock.now_s += 0.2
    run = await bench.waits(run, "reported")
    assert "no progress for 1 s; last seen in train, 3 of 9 done" in run.reason


async def test_a_number_that_no_database_holds_costs_only_its_site(bench, spec, fault):
    bench.site("good")
    bench.site("bad", fault=fault.HUGE_NUMBERS)
    run = await bench.ended(await bench.enqueue(spec(cohort={"min_sites": 2, "quorum": 1})))
    assert run.state == "finished"
    assert bench.outcomes(run)["bad"][0] == "rejected"
    measured = [a for a in bench.running.store.assignments(run.id) if (a.work, a.site) == ("evaluate", "bad")]
    assert [(a.state, a.update_bytes) for a in measured] == [("done", 0)] * 2  # it was asked for no update


async def test_a_site_that_changes_its_mind_during_the_check_does_not_count(bench, spec, fault):
    bench.site("good")
    bad = bench.site("bad", fault=fault.ANNOUNCES_ANOTHER)
    cohort = {"min_sites": 2, "quorum": 1, "stall_s": 20}
    run = await bench.ended(await bench.enqueue(spec(cohort=cohort)))
    assert run.state == "finished"
    assert bench.outcomes(run)["bad"] == ("rejected", "it has announced 6 different updates")
    assert not bad.receipts


async def test_odd_names_and_numbers_reach_neither_logs_nor_tables(bench, spec, fault):
    bench.site("odd", fault=fault.ODD_NAMES)
    run = await bench.ended(await bench.enqueue(spec()))
    assert run.state == "finished"
    measured = bench.running.store.assignments(run.id, 0)[0]
    assert set(measured.metrics) == {"loss", "perplexity", "name", "message", "a_b__31m"}
    assert measured.phase_seconds == {"ok": 1.0}


async def test_a_site_cannot_outweigh_all_others_by_a_claim(bench, spec, fault):
    bench.site("good")
    bench.site("bad", fault=fault.EVALUATES_THE_WORLD)
    stop = {"target": {"metric": "loss", "value": 0.5}}
    run = await bench.ended(await bench.enqueue(spec(cohort={"min_sites": 2}, stop=stop)))
    assert run.reason.startswith("the only round is done")
    assert bench.running.store.rounds(run.id)[0].metrics["loss"] > 5


async def test_words_without_end_are_cut(bench, spec, fault):
    bench.site("bad", fault=fault.TALKS_WITHOUT_END)
    run = await bench.waits(await bench.enqueue(spec(cohort={"attempts": 1})), "reported")
    assert len(bench.outcomes(run)["bad"][1]) < 17_000
    assert len(run.reason) < 1000


async def test_a_late_site_is_left_behind_at_the_deadline(bench, spec, initial, clock, fault):
    bench.site("good", step=2.0)
    slow = bench.site("slow", fault=fault.SILENT)
    cohort = {"min_sites": 2, "quorum": 1, "deadline_s": 1, "stall_s": 100}
    run = await bench.enqueue(spec(cohort=cohort, evaluation={"initial": False}))
    await bench.until(lambda: bench.outcomes(run).get("good") == ("done", "") and slow.asked)
    clock.now_s += 1.1
    run = await bench.ended(run)
    assert run.state == "finished"
    assert bench.outcomes(run)["slow"] == (
        "lost",
        "not finished by the deadline of 1 s",
    )
    assert list(slow.cancelled.values()) == ["not finished by the deadline of 1 s"]


async def test_a_run_waits_for_enough_sites_and_says_so(bench, spec):
    run = await bench.enqueue(spec(cohort={"min_sites": 2}))
    bench.site("a")
    await bench.until(lambda: "1 of 2 fit, 1 connected" in bench.running.store.run(run.id).reason)
    bench.site("b")
    assert (await bench.ended(run)).state == "finished"


async def test_a_site_without_the_data_is_not_asked(bench, spec):
    a = bench.site("a")
    run = await bench.enqueue(spec(data="elsewhere"))
    await bench.until(
        lambda: "0 of 1 fit, 1 connected: 1 lacks data 'elsewhere'" in bench.running.store.run(run.id).reason
    )
    assert not a.assigned.is_set()


async def test_a_model_that_a_site_holds_is_not_sent_again(bench, spec):
    a = bench.site("a")
    run = await bench.ended(await bench.enqueue(spec(rounds=2)))
    assert run.state == "finished"
    assert a.downloads == 3  # the initial model and two rounds', each used to evaluate and to train


async def test_a_cut_upload_goes_on_from_the_bytes_held(bench, spec, initial, fault):
    site = bench.site("a", step=3.0, fault=fault.CUT_ONCE)
    run = await bench.ended(await bench.enqueue(spec()))
    assert run.state == "finished"
    assert site.resumed_at == 60
    np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 3, rtol=1e-6)


async def test_uploads_beyond_the_cap_wait_their_turn(config, tmp_path, spec, bench_of):
    async with coordinator(config.model_copy(update={"concurrent_uploads": 1})) as running:
        bench = bench_of(running)
        for name in "abcd":
            bench.site(name)
        run = await bench.ended(await bench.enqueue(spec(cohort={"min_sites": 4})))
        assert run.state == "finished"
        assert set(bench.outcomes(run).values()) == {("done", "")}


async def test_a_site_that_goes_leaves_its_turn_to_upload_to_others(config, spec, bench_of, clock, fault):
    async with coordinator(config.model_copy(update={"concurrent_uploads": 1})) as running:
        bench = bench_of(running)
        gone = bench.site("gone", fault=fault.NEVER_UPLOADS)
        cohort = {"min_sites": 2, "quorum": 1, "stall_s": 0.3}
        run = await bench.enqueue(spec(cohort=cohort, evaluation={"initial": False}))
        bench.site("good")
        await bench.until(lambda: gone.granted)
        await bench.detach("gone")
        await bench.until(lambda: bench.outcomes(run)["good"] == ("done", ""))
        clock.now_s += 0.31
        assert (await bench.ended(run)).state == "finished"
        assert "the site is not connected" in bench.outcomes(run)["gone"][1]


async def test_a_site_that_reattaches_gets_its_assignment_again(bench, spec, fault):
    site = bench.site("a", fault=fault.SILENT)
    run = await bench.enqueue(spec(evaluation={"initial": False}))
    await asyncio.wait_for(site.assigned.wait(), 60)
    await bench.detach("a")
    bench.site("a", fault=fault.NONE)
    assert (await bench.ended(run)).state == "finished"


async def test_a_stopped_run_keeps_its_last_model(bench, spec, fault):
    site = bench.site("a")
    run = await bench.enqueue(spec(rounds=10_000))
    await bench.until(lambda: bench.running.store.run(run.id).rounds_done >= 2)
    ended = await bench.running.runs.stop(run.id, "enough")
    assert (ended.state, ended.reason) == ("stopped", "enough")
    assert all(record.ended_at_s for record in bench.running.store.rounds(run.id))
    assert bench.model(run)["layer.bias"].shape == (4,)
    await bench.until(lambda: run.id in site.ended_runs)
    assert not list(bench.running.store.spool.folder.iterdir())


async def test_an_evaluation_that_a_stop_cut_off_is_made_up_for(bench, spec, fault):
    site = bench.site("a", fault=fault.NEVER_EVALUATES)
    run = await bench.enqueue(spec())
    await bench.until(site.assigned.is_set)
    assert (await bench.running.runs.stop(run.id, "")).state == "stopped"
    site.fault = fault.NONE
    bench.running.runs.resume(run.id)
    run = await bench.ended(run)
    assert run.state == "finished"
    assert all("loss" in record.metrics for record in bench.running.store.rounds(run.id))


async def test_an_upload_during_shutdown_is_to_be_tried_again(config, bench_of, spec, fault):
    async with coordinator(config) as running:
        bench = bench_of(running)
        site = bench.site("a", fault=fault.NEVER_UPLOADS)
        run = await bench.enqueue(spec())
        await bench.until(lambda: site.granted)
        running.working.cancel()
        await bench.until(running.working.done)
        name = f"{run.id}.1.1.train.a"
        with pytest.raises(Unreachable, match="has yet to go on"):
            await upload(site.transfer, name, site.folder / f"{name}.safetensors", 0)
        site.fault = fault.NONE
    async with coordinator(config) as running:
        bench.running = running
        bench.attach(site)
        assert (await bench.ended(run)).state == "finished"
        assert len(site.trained) == 1


async def test_an_assignment_that_has_ended_is_cancelled_at_attach(bench, spec):
    site = bench.site("a")
    run = await bench.ended(await bench.enqueue(spec()))
    await bench.detach("a")
    site.open_assignments = [f"{run.id}.7.1.train.a"]
    bench.attach(site)
    await bench.until(lambda: site.cancelled)
    assert list(site.cancelled) == site.open_assignments


async def test_a_site_hears_at_attach_of_the_runs_that_ended_without_it(bench, spec):
    bench.site("a")
    ended = await bench.ended(await bench.enqueue(spec()))
    await bench.detach("a")
    under_way = await bench.enqueue(spec())
    site = bench.sites["a"]
    site.ended_runs.clear()
    site.kept_runs = [ended.id, under_way.id, "unheard-of", ended.id[:3]]
    bench.attach(site)
    await bench.until(lambda: under_way.id in site.ended_runs)
    assert site.ended_runs == [ended.id, "unheard-of", ended.id[:3], under_way.id]


async def test_a_restarted_coordinator_goes_on_in_the_same_round(config, bench_of, spec, initial, fault):
    async with coordinator(config) as running:
        bench = bench_of(running)
        done = bench.site("done", step=1.0)
        late = bench.site("late", step=3.0, fault=fault.SILENT)
        run = await bench.enqueue(spec(rounds=2, cohort={"min_sites": 2}))
        await bench.until(lambda: bench.outcomes(run).get("done") == ("done", ""))
        await bench.until(late.assigned.is_set)
    late.fault = fault.NONE
    async with coordinator(config) as running:
        bench.running = running
        bench.attach(late)
        await bench.until(lambda: bench.outcomes(run)["late"] == ("done", ""))
        assert len(done.trained) == 1  # its update of before the restart counts
        bench.attach(done)
        run = await bench.ended(run)
        assert (run.state, run.rounds_done) == ("finished", 2)
        assert len(done.trained) == 2
        np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + 4, rtol=1e-6)


async def test_a_state_of_another_release_is_not_touched(config):
    async with coordinator(config):
        pass
    with sqlite3.connect(config.state_dir / "coordinator.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    with pytest.raises(WrongState, match="tables of revision 9999"):
        async with coordinator(config):
            pass


async def test_only_the_latest_models_are_kept(config, bench_of, spec):
    async with coordinator(config.model_copy(update={"keep_models": KeepModels(last=2, best=0)})) as running:
        bench = bench_of(running)
        bench.site("a")
        run = await bench.ended(await bench.enqueue(spec(rounds=5)))
        rounds = running.store.rounds(run.id)
        kept = [
            record.number
            for record in rounds
            if (config.state_dir / "files" / record.model_digest.replace(":", "-")).exists()
        ]
        assert kept == [4, 5]


async def test_the_cause_of_a_failed_round_is_told_before_its_consequences(bench, spec, fault):
    for number in range(25):
        bench.site(f"a-{number}", fault=fault.SILENT)
    bench.site("z", fault=fault.FAILS)
    cohort = {"min_sites": 26, "attempts": 1}
    run = await bench.enqueue(spec(cohort=cohort, evaluation={"initial": False}))
    run = await bench.waits(run, "reported")
    assert "(z failed: ValueError: no such file; a-0, a-1, " in run.reason
    assert "and 6 more" in run.reason


@pytest.mark.parametrize("work", ["train", "evaluate"])
async def test_a_deadline_passes_while_the_coordinator_is_down(
    config, bench_of, spec, fault, monkeypatch, work
):
    """By hand: the deadline of 60 s is over when the coordinator is back, so 1 s is left of it."""
    monkeypatch.setattr("fedloom_server.patience.RETURN_S", 1.0)
    cohort = {"min_sites": 2, "quorum": 1, "stall_s": 60, "deadline_s": 60 if work == "train" else 600}
    evaluation = {"initial": False, "deadline_s": 60 if work == "evaluate" else 600}
    bad = fault.SILENT if work == "train" else fault.NEVER_EVALUATES
    async with coordinator(config) as running:
        bench = bench_of(running)
        a, slow = bench.site("a"), bench.site("slow", fault=bad)
        run = await bench.enqueue(spec(cohort=cohort, evaluation=evaluation))

        def states():
            return {r.site: r.state for r in running.store.assignments(run.id) if r.work == work}

        await bench.until(lambda: states() == {"a": "done", "slow": "open"})
        for name in ("a", "slow"):
            await bench.detach(name)
    store = Store(config.state_dir)
    (record,) = store.rounds(run.id)
    record.asked_at_s -= 60
    store.save(record)
    store.close()
    async with coordinator(config) as running:
        bench = bench_of(running)
        for site in (a, slow):
            bench.attach(site)
        name = f"{run.id}.1.1.{work}.slow"
        await bench.until(lambda: running.store.assignment(name).state == "lost")
        assert running.store.assignment(name).reason.startswith("not finished by the deadline of 60 s")
