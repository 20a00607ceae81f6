"""The warm group: kept for its run, replaced for another, let go when idle."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedloom_client import groups as groups_module
from fedloom_client.groups import WarmGroups
from fedloom_client.statedir import StateDir
from fedloom_client.training.orders import Order, WorkerProgress, WorkerResult

RESULT = WorkerResult(examples=1, tokens=1, metrics={}, phase_seconds={})


class Group:
    """Notes what happens to it."""

    def __init__(
        self, name: str, events: list[str], started: asyncio.Event, gate: asyncio.Event | None
    ) -> None:
        self.name, self.events, self.started, self.gate = name, events, started, gate

    async def perform(self, order: Order, on_progress: Callable[[WorkerProgress], None]) -> WorkerResult:
        self.events.append(f"{self.name} performs {order.id}")
        self.started.set()
        if self.gate is not None:
            await self.gate.wait()
        return RESULT

    async def stop(self) -> None:
        self.events.append(f"{self.name} stops")


class Bench:
    """Warm groups over noted events."""

    def __init__(self, root: Path) -> None:
        self.state = StateDir(root)
        self.events: list[str] = []
        self.started = asyncio.Event()
        self.gates: dict[str, asyncio.Event] = {}
        """What the work of a run waits for."""
        self.warm = self.make(idle_s=600)

    def make(self, idle_s: float, most: int = 1) -> WarmGroups:
        def group(data: str, folder: Path) -> Group:
            return Group(f"{folder.name}/{data}", self.events, self.started, self.gates.get(folder.name))

        return WarmGroups(self.state, group, idle_s=idle_s, most=most)

    async def perform(self, name: str, run_id: str) -> None:
        order = Order(id=name, work="evaluate", run_id=run_id, round=1, model_path="", assets_dir="", spec={})
        await self.warm.perform(order, "plays", lambda progress: None)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds():  # noqa: ASYNC110 (any condition at all)
                await asyncio.sleep(0.01)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    with bench.state.locked():
        yield bench
        await bench.warm.stop()


async def test_a_run_keeps_its_group(bench: Bench) -> None:
    await bench.perform("one", "a")
    await bench.perform("two", "a")
    assert bench.events == ["a/plays performs one", "a/plays performs two"]


async def test_another_run_replaces_the_group(bench: Bench) -> None:
    await bench.perform("one", "a")
    await bench.perform("two", "b")
    assert bench.events == ["a/plays performs one", "a/plays stops", "b/plays performs two"]


async def test_runs_at_the_same_time_keep_a_group_each_and_a_third_takes_the_place_of_the_idle_one(
    bench: Bench,
) -> None:
    bench.warm = bench.make(idle_s=600, most=2)
    bench.gates["a"] = asyncio.Event()
    long = asyncio.create_task(bench.perform("one", "a"))
    await bench.started.wait()
    await bench.perform("two", "b")
    await bench.perform("three", "c")
    bench.gates["a"].set()
    await long
    assert bench.events == [
        "a/plays performs one", "b/plays performs two", "b/plays stops", "c/plays performs three"
    ]  # fmt: skip


async def test_the_folder_of_a_run_under_way_stays_whatever_others_come(bench: Bench) -> None:
    bench.warm = bench.make(idle_s=600, most=2)
    bench.gates["a"] = asyncio.Event()
    long = asyncio.create_task(bench.perform("one", "a"))
    await bench.started.wait()
    for number in range(groups_module.RUN_FOLDERS_KEPT + 3):
        await bench.perform("x", f"run-{number}")
        await asyncio.sleep(0.01)
    assert (bench.state.runs / "a").is_dir()
    bench.gates["a"].set()
    await long


async def test_an_idle_group_is_let_go_and_comes_back_for_work(bench: Bench) -> None:
    bench.warm = bench.make(idle_s=0.05)
    await bench.perform("one", "a")
    await bench.until(lambda: bench.events[-1] == "a/plays stops")
    await bench.perform("two", "a")
    assert bench.events[-1] == "a/plays performs two"


async def test_work_in_time_keeps_a_group_from_being_let_go(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[asyncio.Event] = []

    async def rest(seconds: float) -> None:
        rests.append(asyncio.Event())
        await rests[-1].wait()

    monkeypatch.setattr("fedloom_client.groups.asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": rest}))
    for number in range(3):
        await bench.perform(str(number), "a")
        await bench.until(lambda number=number: len(rests) > number)
    for over in rests[:-1]:
        over.set()
    await asyncio.sleep(0.05)
    assert "a/plays stops" not in bench.events
    rests[-1].set()
    await bench.until(lambda: bench.events[-1] == "a/plays stops")


async def test_the_end_of_another_run_leaves_the_group(bench: Bench) -> None:
    await bench.perform("one", "a")
    await bench.warm.end_run("b", may_resume=False)
    assert bench.events == ["a/plays performs one"]


async def test_folders_of_runs_whose_end_was_never_heard_do_not_pile_up(bench: Bench) -> None:
    for number in range(groups_module.RUN_FOLDERS_KEPT + 3):
        await bench.perform("x", f"run-{number}")
        await asyncio.sleep(0.01)
    names = {path.name for path in bench.state.runs.iterdir()}
    assert names == {f"run-{number}" for number in range(2, groups_module.RUN_FOLDERS_KEPT + 3)}
