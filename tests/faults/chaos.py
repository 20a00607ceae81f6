"""Faults at random moments, for as long as wanted: the same seed gives the same faults in the same order.

Usage: chaos.py MINUTES [SEED]
"""

import asyncio
import contextlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from faults.federation import ENDS, POLL_S, Federation, federation_of
from faults.ledger import (
    assert_mean_of_what_counted,
    assert_no_leftovers,
    begun,
    finished_at,
    folder_bytes,
    trained,
)
from faults.nullsite import Tensors
from faults.proxy import Proxy

from fedloom.v1.runs_pb2 import RUN_STATE_FINISHED, GetResponse
from fedloom.v1.session_pb2 import WORK_TRAIN
from fedloom_common.errors import Unreachable

EXAMPLES = {"bergen": 3, "hamar": 5, "oslo": 1, "tromso": 7}
ROUNDS = 20
SPEC = {
    "rounds": ROUNDS,
    "cohort": {"min_sites": 2, "quorum": 2, "stall_s": 15, "attempts": 1000},
    "evaluation": {"every_rounds": 3, "initial": True},
}
SETTLE_S = 240.0
"""Once nothing disturbs it all must end within this: keepalive alone takes 80 s to notice a dead line."""
PAUSE_S = (0.5, 4.0)
GROWTH_BYTES, GROWTH_FILES, GROWTH_THREADS = 50 << 20, 16, 16
"""No process may grow by more while it lives; whatever leaked in every round would be far beyond it."""

RECEIPT = re.compile(r"update delivered +assignment=(\S+)")
OWN_ERROR = re.compile(
    r".*(?:of the coordinator's own|does not know|never retrieved|Exception in callback|CRITICAL).*"
)


class Size(NamedTuple):
    """What a process takes."""

    memory_bytes: int
    files: int
    threads: int


class Chaos:
    """Disturbs a federation whose sites each dial through a proxy of their own."""

    def __init__(self, federation: Federation, proxies: dict[str, Proxy], seed: int) -> None:
        self.federation = federation
        self.proxies = proxies
        self.done: Counter[str] = Counter()
        self.most_bytes = 0
        """Largest size of all state folders seen."""
        self._chance = random.Random(seed)
        self._finished: dict[str, int] = {}
        """Trainings that were finished when their site was killed, and how often each had been begun."""

    async def disturb(self, seconds: float, *, kills: bool) -> None:
        """Do random things for so long; everything runs again at the end."""
        faults = [self._pause, self._pause, self._cut, self._cut, self._delay, self._swallow]
        if kills:
            faults += [self._kill_coordinator, self._kill_site, self._kill_site, self._kill_all]
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            await asyncio.sleep(self._chance.uniform(*PAUSE_S))
            fault = self._chance.choice(faults)
            await fault()
            self.done[fault.__name__.removeprefix("_").replace("_", " ")] += 1
            self.most_bytes = max(self.most_bytes, folder_bytes(self.federation.kit))
        for proxy in self.proxies.values():
            proxy.delay_s = 0.0

    def assert_finished_trainings_were_kept(self) -> None:
        """What was finished when its site was killed was never trained again."""
        times = begun(self.federation)
        assert {name: times[name] for name in self._finished} == self._finished

    async def _pause(self) -> None:
        name = self._chance.choice(sorted(self.federation.running))
        process = self.federation.running[name]
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self._chance.choice((0.2, 1.0, 5.0)))
        process.send_signal(signal.SIGCONT)

    async def _cut(self) -> None:
        for site in self._chance.sample(sorted(self.proxies), self._chance.randint(1, len(self.proxies))):
            self.proxies[site].cut(reset=self._chance.random() < 0.5)

    async def _delay(self) -> None:
        self.proxies[self._chance.choice(sorted(self.proxies))].delay_s = self._chance.choice((0, 0.01, 0.1))

    async def _swallow(self) -> None:
        self.proxies[self._chance.choice(sorted(self.proxies))].swallow()

    async def _kill_coordinator(self) -> None:
        self.federation.kill("coordinator")
        await asyncio.sleep(self._chance.choice((0, 0, 1, 5)))
        self.federation.start_coordinator()

    async def _kill_site(self, *, site: str = "") -> None:
        site = site or self._chance.choice(sorted(self.proxies))
        self._kill_and_look(site)
        await asyncio.sleep(self._chance.choice((0, 0, 1, 5)))
        self.federation.start_site(site)

    async def _kill_all(self) -> None:
        self.federation.kill("coordinator")
        for site in self.proxies:
            self._kill_and_look(site)
        self.federation.start_coordinator()
        self.federation.start_sites()

    def _kill_and_look(self, site: str) -> None:
        self.federation.kill(site)
        times = begun(self.federation)
        self._finished |= {name: times[name] for name in finished_at(self.federation, site)}


class Runs:
    """Runs one after the other, for as long as wanted, each checked when it has ended."""

    def __init__(self, federation: Federation, initial: Tensors) -> None:
        self.answers: dict[str, GetResponse] = {}
        self._federation = federation
        self._initial = initial
        self._is_over = False

    async def go_on(self) -> None:
        while True:
            with contextlib.suppress(Unreachable, FileNotFoundError):  # the coordinator was killed meanwhile
                if not await self._waited_for():
                    if self._is_over:
                        return
                    await self._federation.submit(**SPEC)
            await asyncio.sleep(POLL_S)

    def end(self) -> None:
        """Submit no more; what has been submitted ends as it would."""
        self._is_over = True

    async def _waited_for(self) -> bool:
        """Check the runs that have ended; whether others have not."""
        async with self._federation.operator() as coordinator:
            new = [run for run in await coordinator.all_runs() if run.id not in self.answers]
            for run in new:
                if run.state in ENDS:
                    await self._check(await coordinator.run_with_rounds(run.id))
        return any(run.state not in ENDS for run in new)

    async def _check(self, answer: GetResponse) -> None:
        assert answer.run.state == RUN_STATE_FINISHED, answer.run.reason
        assert len(trained(answer)) == ROUNDS
        result = self._federation.model(answer.run.model.digest)
        await asyncio.to_thread(assert_mean_of_what_counted, self._initial, answer, result)
        self.answers[answer.run.id] = answer


async def soak(
    folder: Path, minutes: float, seed: int, seen: Callable[[str], None]
) -> tuple[Counter[str], dict[str, GetResponse]]:
    """Two thirds of the time with kills, then without, so that memory can be compared; then the checks.

    Gives what was done to it, and the runs that ended meanwhile.
    """
    async with _disturbed(folder, seed) as (federation, chaos, runs):
        going = asyncio.create_task(runs.go_on())
        await _while(going, chaos.disturb(40 * minutes, kills=True))
        await _warm(federation)
        before = _sizes(federation)
        await _while(going, chaos.disturb(20 * minutes, kills=False))
        runs.end()
        async with asyncio.timeout(SETTLE_S):
            await going
        await federation.attached(len(EXAMPLES), SETTLE_S)
        _assert_no_growth(before, after := _sizes(federation))
        await assert_no_leftovers(federation)
        _assert_sound(federation, chaos, runs)
        seen(_told(chaos, runs, minutes, before, after))
        return chaos.done, runs.answers


@asynccontextmanager
async def _disturbed(folder: Path, seed: int) -> AsyncIterator[tuple[Federation, Chaos, Runs]]:
    async with federation_of(folder, *EXAMPLES) as federation:
        federation.configure("coordinator", heartbeat_s=1, staged_updates=3, keep_models=5)
        federation.start_coordinator()
        run = await federation.submit(**SPEC)  # with no site there, its model is the initial one
        answer = await federation.get(run)
        assert answer is not None
        runs = Runs(federation, federation.model(answer.run.model.digest))
        proxies = {site: Proxy(federation.port) for site in EXAMPLES}
        for site, proxy in proxies.items():
            await proxy.__aenter__()
            federation.train(site, examples=EXAMPLES[site], seconds=0.2)
            federation.ports[site] = proxy.port
            federation.start_site(site)
        try:
            yield federation, Chaos(federation, proxies, seed), runs
        finally:
            for proxy in proxies.values():
                await proxy.__aexit__()


async def _warm(federation: Federation) -> None:
    """Wait until every process has done all that it does in a round."""
    await federation.attached(len(EXAMPLES), SETTLE_S)
    before = _trainings(federation)
    await federation.until(
        lambda: all(count > before[site] + 1 for site, count in _trainings(federation).items()), SETTLE_S
    )


def _trainings(federation: Federation) -> Counter[str]:
    """How many trainings each site has begun."""
    counts = Counter(name.rpartition(".")[2] for name in begun(federation))
    return Counter({site: counts[site] for site in EXAMPLES})


async def _while(going: asyncio.Task[None], work: Coroutine[Any, Any, None]) -> None:
    """Do something while the runs go on; what ends them ends it."""
    task = asyncio.create_task(work)
    await asyncio.wait({task, going}, return_when=asyncio.FIRST_COMPLETED)
    if going.done():
        task.cancel()
        going.result()
    await task


def _sizes(federation: Federation) -> dict[str, Size]:
    found = {}
    for name, process in federation.running.items():
        facts = psutil.Process(process.pid)
        found[name] = Size(facts.memory_info().rss, facts.num_fds(), facts.num_threads())
    return found


def _assert_no_growth(before: dict[str, Size], after: dict[str, Size]) -> None:
    for name, size in after.items():
        assert size.memory_bytes < before[name].memory_bytes + GROWTH_BYTES, (name, before, after)
        assert size.files < before[name].files + GROWTH_FILES, (name, before, after)
        assert size.threads < before[name].threads + GROWTH_THREADS, (name, before, after)


def _assert_sound(federation: Federation, chaos: Chaos, runs: Runs) -> None:
    chaos.assert_finished_trainings_were_kept()
    for site in EXAMPLES:
        _assert_receipts_kept(federation.log(site), site, runs.answers)
    wrong = [line for name in ("coordinator", *EXAMPLES) for line in OWN_ERROR.findall(federation.log(name))]
    assert not wrong, wrong


def _assert_receipts_kept(log: str, site: str, answers: Mapping[str, GetResponse]) -> None:
    """Every update for which its site has a receipt counts."""
    done = {
        f"{run}.{record.number}.{told.attempt}.train.{site}"
        for run, answer in answers.items()
        for record in answer.rounds
        for told in record.sites
        if told.site == site and told.work == WORK_TRAIN and told.state == "done"
    }
    receipts = set(RECEIPT.findall(log))
    assert receipts <= done, receipts - done


def _told(chaos: Chaos, runs: Runs, minutes: float, before: dict[str, Size], after: dict[str, Size]) -> str:
    faults = ", ".join(f"{count} x {name}" for name, count in sorted(chaos.done.items()))
    attempts = Counter(record.attempt > 1 for answer in runs.answers.values() for record in answer.rounds)
    grown = max(after[name].memory_bytes - before[name].memory_bytes for name in before) / 1e6
    return (
        f"{minutes:g} min, {sum(chaos.done.values())} faults ({faults}): {len(runs.answers)} runs of "
        f"{attempts.total()} rounds ended, {attempts[True]} of them with further attempts; no process grew "
        f"by more than {grown:.0f} MB; at most {chaos.most_bytes / 1e6:.0f} MB on disk"
    )


if __name__ == "__main__":
    chosen_seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    tell = sys.stdout.write
    tell(f"logs and states: {place}\n")
    asyncio.run(soak(place, float(sys.argv[1]), chosen_seed, lambda seen: tell(seen + "\n")))
    shutil.rmtree(place)  # after a failure it is what one wants to look at
