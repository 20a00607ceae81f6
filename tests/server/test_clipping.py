"""Norm clipping in real rounds: by the median of the rounds before, which is durable."""

import numpy as np
import pytest

from fedloom_server.app import coordinator

STEPS = {"a": 1.0, "b": 1.0, "c": 1.0, "attacker": 100.0}
NORM = 4.0  # of a step of 1 on the initial model's sixteen values


def assert_moved(bench, run, initial, change):
    assert run.state == "finished", run.reason
    np.testing.assert_allclose(bench.model(run)["layer.bias"], initial["layer.bias"] + change, rtol=1e-5)


def attacked(bench):
    for name, step in STEPS.items():
        bench.site(name, step=step)


@pytest.mark.parametrize("staged", [2, 8])
async def test_an_update_that_goes_too_far_counts_as_if_it_had_gone_as_far_as_the_others(
    config, spec, bench_of, initial, staged
):
    async with coordinator(config.model_copy(update={"staged_updates": staged})) as running:
        bench = bench_of(running)
        attacked(bench)
        run = await bench.enqueue(spec(rounds=3, cohort={"min_sites": 4}, aggregation={"clip": {}}))
        run = await bench.ended(run)
        assert_moved(bench, run, initial, 3.0)
        norms = {a.site: a.update_norm for a in running.store.assignments(run.id, 2) if a.work == "train"}
        assert norms == pytest.approx({name: NORM * step for name, step in STEPS.items()}, rel=1e-5)


async def test_a_factor_leaves_room_above_the_median(bench, spec, initial):
    attacked(bench)
    run = await bench.enqueue(spec(cohort={"min_sites": 4}, aggregation={"clip": {"factor": 5}}))
    assert_moved(bench, await bench.ended(run), initial, (1 + 1 + 1 + 5) / 4)


async def test_the_median_is_that_of_the_rounds_before_as_they_came(bench, spec, initial):
    for name in "ab":
        bench.site(name).learn = lambda tensors, number: {
            key: value + np.float32(1 if number == 1 else 3) for key, value in tensors.items()
        }
    run = await bench.enqueue(spec(rounds=3, cohort={"min_sites": 2}, aggregation={"clip": {"rounds": 1}}))
    assert_moved(bench, await bench.ended(run), initial, 1 + 1 + 3)  # the third goes by the second's 3


async def test_the_median_goes_on_over_a_restart(config, spec, bench_of, initial):
    aggregation = {"clip": {"rounds": 1}}
    wanted = spec(rounds=2, cohort={"min_sites": 4}, aggregation=aggregation)
    async with coordinator(config) as running:
        bench = bench_of(running)
        attacked(bench)
        for site in bench.sites.values():
            site.learn = lambda tensors, _, site=site: {
                key: value + np.float32(site.step) for key, value in tensors.items()
            }
        run = await bench.enqueue(wanted)
        await bench.until(lambda: running.store.run(run.id).rounds_done >= 1)
    async with coordinator(config) as running:
        bench.running = running
        for site in list(bench.sites.values()):
            await bench.detach(site.name)
            site.step = 50.0
            bench.attach(site)
        run = await bench.ended(run)
        trained_again = [a for a in running.store.assignments(run.id, 2) if a.update_norm > 100 * NORM]
        assert not trained_again
        assert_moved(bench, run, initial, 2.0)


async def test_buffers_of_an_asynchronous_run_are_clipped_too_and_hold_more_than_may_be_staged(
    config, spec, bench_of, initial
):
    async with coordinator(config.model_copy(update={"staged_updates": 2})) as running:
        bench = bench_of(running)
        for name in "abcde":
            bench.site(name)
        mode = {"kind": "async", "buffer": 5, "staleness": {"exponent": 0}}
        run = await bench.enqueue(spec(rounds=2, mode=mode, aggregation={"clip": {}}))
        assert_moved(bench, await bench.ended(run), initial, 2.0)


async def test_a_robust_rule_sees_clipped_updates(bench, spec, initial):
    for name, step in {"a": 1.0, "b": 2.0, "c": 3.0, "d": 400.0, "e": 500.0}.items():
        bench.site(name, step=step)
    rule = {"name": "trimmed_mean", "byzantine": 1}
    run = await bench.enqueue(
        spec(cohort={"min_sites": 5}, aggregation={"rule": rule, "clip": {"factor": 2}})
    )
    assert_moved(bench, await bench.ended(run), initial, (2 + 3 + 6) / 3)  # 400 and 500 become 6
