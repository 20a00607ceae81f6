"""Claims about kill -9 at random moments."""

import asyncio
import random
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from faults.federation import Federation, federation_of
from faults.ledger import (
    assert_every_site_counted_once,
    assert_mean_of_what_counted,
    assert_no_leftovers,
    begun,
    counted,
    finished_at,
    trained,
)

from fedloom.v1.runs_pb2 import GetResponse

KILLS = 30
EXAMPLES = {"bergen": 3, "oslo": 1, "tromso": 7}
ROUNDS = 8
SPECS = {
    "as-is": {},
    "codecs": {"transport": {"up": ["topk", "int8"], "down": ["bf16"]}},
}

SYSCALLS = {"fdatasync": 30, "fsync": 12, "pwrite64": 100, "rename": 10, "unlink": 10}
"""What changes files, and how many of each one thread of a coordinator makes in a round or two."""


class Disturbed:
    """A federation whose runs are compared with one that nothing disturbs."""

    def __init__(self, federation: Federation, spec: dict[str, object]) -> None:
        self.federation = federation
        self.spec = spec | {
            "rounds": ROUNDS,
            "aggregation": {"deterministic": True},
            "evaluation": {"every_rounds": 1, "initial": True},
            "cohort": {"min_sites": len(EXAMPLES), "stall_s": 120},
        }
        self.reference: GetResponse
        self.ending: asyncio.Task[GetResponse]
        """Waits for the end of the run that is disturbed."""
        self.round_s = 0.0
        """How long a round takes when nothing disturbs it."""

    async def begin(self) -> None:
        """Start everything and let the reference run go through."""
        federation = self.federation
        federation.configure("coordinator", staged_updates=2, keep_models=100)
        federation.start_coordinator()
        for site, examples in EXAMPLES.items():
            federation.train(site, examples=examples, seconds=0.1)
            federation.start_site(site)
        run = await federation.submit(**self.spec)
        began_s = time.monotonic()
        self.reference = await federation.finished(run, 240)
        self.round_s = (time.monotonic() - began_s) / ROUNDS

    async def until_killed(self, kills: int, kill: Callable[[], Awaitable[None]]) -> list[GetResponse]:
        """Let runs go through, as many as so many kills take; each has the models of the reference."""
        federation, done, answers = self.federation, 0, []
        while done < kills:
            run = await federation.submit(**self.spec)
            self.ending = asyncio.create_task(federation.finished(run, 300))
            while done < kills and not self.ending.done():
                await kill()
                done += 1
            answers.append(answer := await self.ending)
            wanted = [record.model.digest for record in trained(self.reference)]
            assert [record.model.digest for record in trained(answer)] == wanted
        return answers


@pytest.mark.faults(
    injected="kill -9 of the coordinator at 30 random moments of a run",
    must="the run goes on in the same round; no update that was trained is trained again; all models are "
    "bit-equal to those of an undisturbed run, and to the mean calculated by hand",
)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", SPECS)
async def test_a_coordinator_killed_thirty_times_gives_the_same_models(tmp_path, kind, seen):
    chance = random.Random(4)
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        disturbed = Disturbed(federation, SPECS[kind])
        await disturbed.begin()
        initial = federation.model(disturbed.reference.rounds[0].model.digest)

        async def kill() -> None:
            if chance.random() < 0.8:  # else while it starts
                await federation.answered()
            await asyncio.sleep(chance.uniform(0, 2 * disturbed.round_s))
            federation.kill("coordinator")
            federation.start_coordinator()

        answers = await disturbed.until_killed(KILLS, kill)
        for answer in answers:
            assert_every_site_counted_once(federation, answer, EXAMPLES)
        if kind == "as-is":
            result = federation.model(answers[-1].run.model.digest)
            assert_mean_of_what_counted(initial, answers[-1], result)
        await assert_no_leftovers(federation)
    seen(f"{kind}: {KILLS} kills in {len(answers)} runs of {ROUNDS} rounds, every training counted once")


def dying_at(call: str, number: int) -> list[str]:
    """A wrapper that kills a process when one of its threads makes its n-th such call."""
    return [
        "strace", "-f", "-D", "-qq", "-o", "/dev/null",
        "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}",
    ]  # fmt: skip


@pytest.mark.faults(
    injected="kill -9 of the coordinator at its n-th write, sync, rename or removal of a file, 15 times",
    must="as above, between any two steps of a change of state",
)
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.timeout(600)
async def test_a_coordinator_killed_between_two_writes_gives_the_same_models(tmp_path, seen):
    chance = random.Random(5)
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        disturbed = Disturbed(federation, SPECS["codecs"])
        await disturbed.begin()
        killed: Counter[str] = Counter()

        async def kill() -> None:
            call, most = chance.choice(list(SYSCALLS.items()))
            federation.kill("coordinator")
            federation.start_coordinator(wrapper=dying_at(call, chance.randint(1, most)))
            process = federation.running["coordinator"]
            await federation.until(lambda: process.poll() is not None or disturbed.ending.done(), 120)
            killed[call] += process.poll() is not None  # else the run was over before
            federation.kill("coordinator")
            federation.start_coordinator()

        answers = await disturbed.until_killed(15, kill)
        assert killed.total() >= 10, killed
        for answer in answers:
            assert_every_site_counted_once(federation, answer, EXAMPLES)
        await assert_no_leftovers(federation)
    seen(", ".join(f"{count} at {call}" for call, count in killed.items()))


@pytest.mark.faults(
    injected="kill -9 of a site's daemon at 30 random moments of a run",
    must="a training that was finished is delivered after the restart and not done again; all models are "
    "bit-equal to those of an undisturbed run",
)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", SPECS)
async def test_a_site_killed_thirty_times_delivers_what_it_had_finished(tmp_path, kind, seen):
    chance = random.Random(6)
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        disturbed = Disturbed(federation, SPECS[kind])
        await disturbed.begin()
        finished: dict[str, int] = {}

        async def kill() -> None:
            await asyncio.sleep(chance.uniform(0, 3 * disturbed.round_s))
            site = chance.choice(sorted(EXAMPLES))
            federation.kill(site)
            times = begun(federation)
            finished.update({name: times[name] for name in finished_at(federation, site)})
            federation.start_site(site)

        answers = await disturbed.until_killed(KILLS, kill)
        times = begun(federation)
        assert {name: times[name] for name in finished} == finished
        for answer in answers:
            assert [counted(record) for record in trained(answer)] == [EXAMPLES] * ROUNDS
        await assert_no_leftovers(federation)
    again = sum(times.values()) - len(times)
    seen(
        f"{kind}: {len(finished)} finished trainings survived {KILLS} kills, {again} unfinished were repeated"
    )


@pytest.mark.faults(
    injected="kill -9 of the coordinator and all sites at once, at 10 random moments",
    must="everything goes on by itself; all models are bit-equal to those of an undisturbed run",
)
@pytest.mark.timeout(600)
async def test_everything_killed_at_once_goes_on(tmp_path, seen):
    chance = random.Random(7)
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        disturbed = Disturbed(federation, SPECS["codecs"])
        await disturbed.begin()

        async def kill() -> None:
            await federation.attached(len(EXAMPLES))
            await asyncio.sleep(chance.uniform(0, 3 * disturbed.round_s))
            for name in list(federation.running):
                federation.kill(name)
            federation.start_coordinator()
            federation.start_sites()

        answers = await disturbed.until_killed(10, kill)
        for answer in answers:
            assert [counted(record) for record in trained(answer)] == [EXAMPLES] * ROUNDS
        await assert_no_leftovers(federation)
    seen(f"10 times in {len(answers)} runs")
