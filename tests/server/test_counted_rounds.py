"""Sites are told which of their updates counted, as what the others left at them must not stay."""

import asyncio
import threading

import pytest
from fakesite import FakeSite
from sitefaults import Fault

from fedloom.v1 import session_pb2 as pb
from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.encoder import encode_model
from fedloom_common.errors import BadTensor
from fedloom_common.tensorfiles import TensorFile
from fedloom_server import folding
from fedloom_server.app import coordinator

TRAIN_ONLY = {"initial": False, "every_rounds": 0}
UP = [{"name": "topk", "fraction": 0.5}]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("fedloom_server.rounds.ATTEMPT_PAUSE_S", 0.1)


@pytest.fixture
def spec_that_leaves(spec):
    def make(**changes):
        return spec(**({"evaluation": TRAIN_ONLY, "transport": {"up": UP}} | changes))

    return make


class EncodingSite(FakeSite):
    """A fake site whose updates are encoded as the run asks."""

    up = ()

    def _update_of(self, assignment, model):
        path = super()._update_of(assignment, model)
        encoded = path.with_suffix(".encoded")
        with TensorFile(path) as trained, TensorFile(model) as base:
            digest = assignment.model.digest
            encode_model(Chain(self.up), trained=trained, base=base, base_digest=digest, out=encoded)
        self._updates[assignment.id] = encoded
        return encoded


def site(bench, name, spec, *, gated=False):
    made = EncodingSite(0, name, bench.folder / name, step=1.0, examples=10, fault=Fault.NONE)
    made.up = spec.transport.up
    made.gate = asyncio.Semaphore(0) if gated else None
    return bench.attach(made)


def told(a_site):
    """By round and attempt, what the site was told to have counted; None if it was not told."""
    trainings = [asked for asked in a_site.asked if asked.work == pb.WORK_TRAIN]
    return {
        (asked.round, asked.attempt): asked.counted_round if asked.HasField("counted_round") else None
        for asked in trainings
    }


async def update_of(bench, run, name, training):
    """Until a site's update is in."""
    there = f"{run.id}.{training}.train.{name}"
    await bench.until(lambda: getattr(bench.running.store.assignment(there), "state", "") == "done")


async def test_a_site_that_a_new_try_leaves_out_hears_that_its_update_did_not_count(bench, spec_that_leaves):
    spec = spec_that_leaves(rounds=3, cohort={"min_sites": 3, "quorum": 3, "attempts": 9})
    out, stays, fails = (
        site(bench, "out", spec),
        site(bench, "stays", spec),
        site(bench, "x", spec, gated=True),
    )
    run = await bench.enqueue(spec)
    for name in ("out", "stays"):
        await update_of(bench, run, name, "1.1")
    fails.send(failure=pb.Failure(assignment_id=f"{run.id}.1.1.train.x", reason="out of memory"))
    await bench.detach("out")
    other = site(bench, "other", spec)
    fails.gate.release()
    fails.gate.release()
    await update_of(bench, run, "other", "1.2")
    bench.attach(out)
    await bench.until(lambda: (2, 1) in told(stays))
    for _ in range(9):
        fails.gate.release()
    assert (await bench.ended(run)).state == "finished"
    assert told(stays) == {(1, 1): 0, (1, 2): 0, (2, 1): 1, (3, 1): 2}
    assert told(other)[2, 1] == 1
    assert told(out) == {(1, 1): 0, (2, 1): 0, (3, 1): 2}


async def test_an_update_that_joins_a_later_round_counts_as_that_of_its_own(bench, spec_that_leaves):
    cohort = {"min_sites": 2, "quorum": 1, "deadline_s": 3, "late": "carry"}
    spec = spec_that_leaves(rounds=3, cohort=cohort)
    a, slow = site(bench, "a", spec, gated=True), site(bench, "slow", spec, gated=True)
    run = await bench.enqueue(spec)
    a.gate.release()
    await bench.until(lambda: bench.running.store.run(run.id).rounds_done == 1)
    slow.gate.release()
    await update_of(bench, run, "slow", "1.1")
    for gate in (a.gate, a.gate, slow.gate):
        gate.release()
    assert (await bench.ended(run)).state == "finished"
    assert told(slow) == {(1, 1): 0, (3, 1): 1}
    assert told(a) == {(1, 1): 0, (2, 1): 1, (3, 1): 2}


@pytest.mark.parametrize("restarts", [False, True])
async def test_an_asynchronous_run_tells_the_training_whose_update_counted(
    config, bench_of, spec_that_leaves, restarts
):
    mode = {"kind": "async", "buffer": 1, "staleness": {"max": 1}}
    spec = spec_that_leaves(rounds=4, mode=mode, cohort={"min_sites": 2})
    async with coordinator(config) as running:
        bench = bench_of(running)
        a, slow = site(bench, "a", spec, gated=True), site(bench, "slow", spec, gated=True)
        run = await bench.enqueue(spec)
        for training in (1, 2):
            await bench.until(lambda n=training: (n, 1) in told(a))
            a.gate.release()
            await update_of(bench, run, "a", f"{training}.1")
        await bench.until(lambda: (2, 1) in told(slow) and (3, 1) in told(a))
        if not restarts:
            assert told(a) == {(1, 1): 0, (2, 1): 1, (3, 1): 2}
            assert told(slow) == {(1, 1): 0, (2, 1): 0}  # its first fell too far behind
            return
    for left in (a, slow):
        await bench.detach(left.name)
        left.asked.clear()
    async with coordinator(config) as bench.running:
        for left in (a, slow):
            bench.attach(left)
        await bench.until(lambda: a.asked and slow.asked)
        assert (told(a), told(slow)) == ({(3, 1): 2}, {(2, 1): 0})


async def test_an_asynchronous_run_that_failed_tells_its_sites_that_what_it_lost_does_not_count(
    bench, spec_that_leaves, monkeypatch
):
    is_there = threading.Event()

    def overflow(*arguments):
        assert is_there.wait(20)
        raise BadTensor("the next model's tensor w is not finite in F32")

    monkeypatch.setattr(folding, "make_model", overflow)
    spec = spec_that_leaves(rounds=4, mode={"kind": "async", "buffer": 1}, cohort={"min_sites": 2})
    a, slow = site(bench, "a", spec, gated=True), site(bench, "slow", spec, gated=True)
    run = await bench.enqueue(spec)
    a.gate.release()
    await bench.until(lambda: [r.state for r in bench.running.store.rounds(run.id)][:1] == ["aggregating"])
    slow.gate.release()
    await update_of(bench, run, "slow", "1.1")
    is_there.set()
    run = await bench.ended(run)
    bench.running.runs.resume(run.id)
    await bench.until(lambda: (2, 2) in told(a) and (2, 2) in told(slow))
    assert told(a)[2, 2] == told(slow)[2, 2] == 0


async def test_a_run_whose_updates_leave_nothing_tells_nothing_of_them(bench, spec):
    a = bench.site("a")
    await bench.ended(await bench.enqueue(spec(rounds=2, evaluation=TRAIN_ONLY)))
    assert told(a) == {(1, 1): None, (2, 1): None}
