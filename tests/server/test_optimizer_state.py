"""The server optimizer in real rounds: its state goes on from round to round, whatever comes between."""

from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedloom_server.app import coordinator
from fedloom_server.config import KeepModels
from fedloom_server.retention import drop_old_models

DILOCO = {"name": "diloco", "lr": 0.5, "momentum": 0.8}


def steps_by_hand(changes, velocity=0.0):
    """What rounds add to the model, with lr 0.5 and momentum 0.8."""
    total = 0.0
    for change in changes:
        velocity = 0.8 * velocity + change
        total += 0.5 * (change + 0.8 * velocity)
    return total


def optimizer(spec, rounds, more=None, **changes):
    aggregation = {"server_optimizer": DILOCO} | (more or {})
    return spec(rounds=rounds, cohort={"min_sites": 2}, aggregation=aggregation, **changes)


def two_sites(bench):
    return bench.site("a", step=1.0, examples=10), bench.site("b", step=4.0, examples=20)  # 3 on average


async def test_momentum_goes_on_from_round_to_round(bench, spec, initial):
    two_sites(bench)
    run = await bench.ended(await bench.enqueue(optimizer(spec, 3)))
    assert run.state == "finished", run.reason
    wanted = initial["layer.bias"] + steps_by_hand([3.0] * 3)
    np.testing.assert_allclose(bench.model(run)["layer.bias"], wanted, rtol=1e-5)


async def test_momentum_goes_on_over_a_restart(config, bench_of, spec, initial, fault):
    async with coordinator(config) as running:
        bench = bench_of(running)
        a, b = two_sites(bench)
        run = await bench.enqueue(optimizer(spec, 4, evaluation={"every_rounds": 0, "initial": False}))
        await bench.until(lambda: running.store.run(run.id).rounds_done >= 1)
    async with coordinator(config) as running:
        bench.running = running
        for site in (a, b):
            await bench.detach(site.name)
            bench.attach(site)
        run = await bench.ended(run)
        wanted = initial["layer.bias"] + steps_by_hand([3.0] * 4)
        np.testing.assert_allclose(bench.model(run)["layer.bias"], wanted, rtol=1e-5)


@pytest.mark.parametrize("after", [None, 1])
async def test_a_clone_that_goes_on_from_a_model_goes_on_from_its_momentum(bench, spec, initial, after):
    two_sites(bench)
    origin = await bench.ended(await bench.enqueue(optimizer(spec, 2)))
    text = optimizer(spec, 1).model_dump_json()
    clone = await bench.running.runs.submissions.clone_from_model(origin.id, text, after)
    clone = await bench.ended(clone)
    wanted = initial["layer.bias"] + steps_by_hand([3.0] * ((after or 2) + 1))
    np.testing.assert_allclose(bench.model(clone)["layer.bias"], wanted, rtol=1e-5)


async def test_the_state_that_a_clone_began_with_stays_with_its_model_when_the_origin_drops_both(bench, spec):
    two_sites(bench)
    store, submissions = bench.running.store, bench.running.runs.submissions
    origin = await bench.ended(await bench.enqueue(optimizer(spec, 2)))
    clone = await submissions.clone_from_model(origin.id, optimizer(spec, 1).model_dump_json(), 1)
    clone = await bench.ended(clone)
    drop_old_models(store, origin, KeepModels(last=1, best=0))
    began = store.rounds(clone.id)[0].base_digest
    assert began == store.rounds(origin.id)[1].model_digest
    assert (store.files.has(began), store.files.has(clone.optimizer_digest)) == (True, True)


async def test_a_clone_with_another_optimizer_begins_without_momentum(bench, spec, initial):
    two_sites(bench)
    origin = await bench.ended(await bench.enqueue(optimizer(spec, 1)))
    other = {"server_optimizer": {"name": "fedavgm", "lr": 1.0, "momentum": 0.8}}
    text = optimizer(spec, 1, other).model_dump_json()
    clone = await bench.ended(await bench.running.runs.submissions.clone_from_model(origin.id, text, None))
    wanted = initial["layer.bias"] + steps_by_hand([3.0]) + 3.0
    np.testing.assert_allclose(bench.model(clone)["layer.bias"], wanted, rtol=1e-5)


async def test_a_state_is_kept_as_long_as_its_model(config, bench_of, spec):
    async with coordinator(config.model_copy(update={"keep_models": KeepModels(last=2, best=0)})) as running:
        bench = bench_of(running)
        two_sites(bench)
        run = await bench.ended(await bench.enqueue(optimizer(spec, 4)))
        states = {record.number: record.optimizer_digest for record in running.store.rounds(run.id)}
        assert [number for number, digest in states.items() if digest] == [1, 2, 3, 4]
        kept = [number for number, digest in states.items() if digest and running.store.files.has(digest)]
        assert kept == [3, 4]


async def test_versions_of_an_asynchronous_run_have_momentum_too(bench, spec, initial):
    bench.site("a", step=3.0)
    aggregation = {"server_optimizer": DILOCO}
    run = await bench.ended(
        await bench.enqueue(spec(rounds=3, mode={"kind": "async", "buffer": 1}, aggregation=aggregation))
    )
    assert run.state == "finished", run.reason
    wanted = initial["layer.bias"] + steps_by_hand([3.0] * 3)
    np.testing.assert_allclose(bench.model(run)["layer.bias"], wanted, rtol=1e-5)


async def test_the_way_down_tells_what_the_step_made(bench, spec, initial):
    two_sites(bench)
    run = await bench.ended(await bench.enqueue(optimizer(spec, 3, transport={"down": "int8"})))
    assert run.state == "finished", run.reason
    wanted = initial["layer.bias"] + steps_by_hand([3.0] * 3)
    np.testing.assert_allclose(bench.model(run)["layer.bias"], wanted, rtol=1e-2)
    store = bench.running.store
    records = store.rounds(run.id)[1:]
    for before, record in pairwise(records):
        states = [load_file(store.files.path(r.optimizer_digest)) for r in (before, record)]
        momentum = [state["momentum/layer.bias"] for state in states]
        np.testing.assert_allclose(momentum[1], 0.8 * momentum[0] - 3.0, rtol=1e-5)


async def test_a_robust_centre_is_stepped_from_like_a_mean(bench, spec, initial):
    for name, step in {"a": 2.0, "b": 3.0, "c": 900.0}.items():
        bench.site(name, step=step)
    aggregation = {"rule": "median", "server_optimizer": DILOCO}
    run = await bench.ended(
        await bench.enqueue(spec(rounds=2, cohort={"min_sites": 3}, aggregation=aggregation))
    )
    wanted = initial["layer.bias"] + steps_by_hand([3.0] * 2)
    np.testing.assert_allclose(bench.model(run)["layer.bias"], wanted, rtol=1e-5)
