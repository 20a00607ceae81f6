"""A coordinator that was killed before any transaction goes on as if it had not been.

The disk, as it was before each transaction, is what the next coordinator finds: two runs at once on the
same sites, one of them paused for a while, one whose slow site is always late.
"""

import asyncio

import numpy as np
import pytest
from disks import copy_of, counted
from safetensors.numpy import load_file

from fedloom_server.app import coordinator
from fedloom_server.config import KeepModels
from fedloom_server.eligibility import Description
from fedloom_server.records import Round
from fedloom_server.roster import Roster
from fedloom_server.sites import Sites
from fedloom_server.store import Store

STEPS, EXAMPLES = {"a": 1.0, "b": 4.0, "slow": -2.5}, {"a": 10, "b": 30, "slow": 60}
MOST_DISKS = 400


@pytest.mark.parametrize(
    "every", [pytest.param(67, id="some"), pytest.param(1, id="every", marks=pytest.mark.slow)]
)
async def test_a_kill_before_any_transaction_changes_no_result(
    config, bench_of, spec, tmp_path, monkeypatch, every
):
    evaluation = {"initial": True, "every_rounds": 2}
    exact = spec(
        name="exact", rounds=3, cohort={"min_sites": 3}, evaluation=evaluation,
        aggregation={"deterministic": True, "server_optimizer": "diloco", "clip": {}},
    )  # fmt: skip
    cohort = {"min_sites": 3, "quorum": 1, "deadline_s": 0.2, "late": "carry"}
    carried = spec(name="carried", rounds=3, cohort=cohort, evaluation=evaluation)
    config = config.model_copy(update={"staged_updates": 2, "keep_models": KeepModels(last=100, best=0)})
    disks = []

    def save(self, *records):
        if self is watched and len(disks) < MOST_DISKS:
            disks.append(copy_of(config.state_dir, tmp_path / f"disk-{len(disks)}"))
        keep(self, *records)

    watched, keep = None, Store.save
    async with coordinator(config) as running:
        bench = bench_of(running)
        _sites(bench)
        runs = [await bench.enqueue(exact), await bench.enqueue(carried)]
        watched = running.store
        with monkeypatch.context() as patched:
            patched.setattr(Store, "save", save)
            await bench.until(lambda: running.store.run(runs[0].id).rounds_done == 1)
            await running.runs.pause(runs[0].id, "")
            await bench.ended(runs[1], seconds=40)
            running.runs.resume(runs[0].id)
            wanted = (await bench.ended(runs[0], seconds=40)).model_digest
        _assert_models_by_hand(running.store, running.store.run(runs[1].id))
        assert any(a.staleness for a in running.store.assignments(runs[1].id))
    assert 40 < len(disks) < MOST_DISKS
    for disk in disks[::every]:
        await _go_on(config.model_copy(update={"state_dir": disk}), bench_of, runs, wanted)


@pytest.mark.parametrize(("mode", "at_least"), [({"kind": "sync"}, 2), ({"kind": "async", "buffer": 2}, 1)])
async def test_a_kill_before_a_measurement_leaves_no_model_unmeasured(
    config, bench_of, spec, tmp_path, monkeypatch, mode, at_least
):
    disk, keep = tmp_path / "disk", Store.save

    def save(self, *records):
        keep(self, *records)
        if not disk.exists() and any(isinstance(r, Round) and r.state == "evaluating" for r in records):
            copy_of(config.state_dir, disk)

    monkeypatch.setattr(Store, "save", save)
    wanted = spec(mode=mode, cohort={"min_sites": 2}, evaluation={"initial": False})
    async with coordinator(config) as running:
        bench = bench_of(running)
        sites = [bench.site("a"), bench.site("b")]
        run = await bench.ended(await bench.enqueue(wanted))
        for site in sites:
            await bench.detach(site.name)
    async with coordinator(config.model_copy(update={"state_dir": disk})) as running:
        bench = bench_of(running)
        await asyncio.sleep(0.3)
        bench.attach(sites[0])
        await asyncio.sleep(0.5)
        bench.attach(sites[1])
        run = await bench.ended(run)
        assert run.state == "finished"
        assert "loss" in running.store.rounds(run.id)[-1].metrics
        rows = [a for a in running.store.assignments(run.id) if a.work == "evaluate" and a.state == "done"]
        assert len(rows) >= at_least


async def test_a_site_that_was_not_written_down_before_a_kill_is_waited_for_after_it(tmp_path):
    store = Store(tmp_path)
    sites = Sites(Roster(store))
    waiting = asyncio.create_task(sites.returned({"a"}))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    with sites.attached("a", Description(), link=object()):
        await asyncio.wait_for(waiting, 60)
    store.close()


async def _go_on(config, bench_of, runs, wanted):
    """Start a coordinator on what another one left, and see both runs to their end."""
    before = counted(config.state_dir)
    async with coordinator(config) as running:
        bench = bench_of(running)
        sites = _sites(bench)
        if running.store.run(runs[0].id).state == "paused":
            running.runs.resume(runs[0].id)
        for run in runs:
            ended = await bench.ended(run, seconds=40)
            assert (ended.state, ended.rounds_done) == ("finished", 3), ended.reason
        assert running.store.run(runs[0].id).model_digest == wanted
        _assert_models_by_hand(running.store, running.store.run(runs[1].id))
        rows = {a.id: a for run in runs for a in running.store.assignments(run.id)}
        left_over = {rows[name].reason for name in before if rows[name].state != "done"}
        assert left_over <= {"no round was left to take its late update: the run was finished"}
        assert not before & {trained for site in sites for trained in site.trained}
        assert not list(running.store.spool.folder.iterdir())
        for site in sites:
            await bench.detach(site.name)


def _sites(bench):
    sites = [bench.site(name, step=step, examples=EXAMPLES[name]) for name, step in STEPS.items()]
    sites[-1].seconds = 0.35
    return sites


def _assert_models_by_hand(store, run):
    """Every round's model is the one before and the steps of its updates, by what the rows say."""
    rounds = [record for record in store.rounds(run.id) if record.number]
    assert [record.number for record in rounds] == [1, 2, 3]
    model, exponent = load_file(store.files.path(rounds[0].base_digest)), run.spec.cohort.staleness.exponent
    for record in rounds:
        trained = [a for a in store.assignments(run.id, record.number) if a.work == "train"]
        done = [a for a in trained if a.state == "done"]
        taken = [a for a in done if a.attempt == record.attempt and not a.is_late]
        step = sum(a.examples * (1 + a.staleness) ** -exponent * STEPS[a.site] for a in taken)
        change = np.float64(step / sum(a.examples for a in taken))
        model = {name: tensor + change for name, tensor in model.items()}
        came = load_file(store.files.path(record.model_digest))
        for name, tensor in model.items():
            np.testing.assert_allclose(came[name], tensor, rtol=2e-6, atol=2e-6)
