"""The warm group: kept for its run, replaced for another, let go when idle."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fedloom_client import groups as groups_module
from fedloom_client.groups import WarmGroup
from fedloom_client.statedir import StateDir
from fedloom_client.training.orders import Order, WorkerProgress, WorkerResult

RESULT = WorkerResult(examples=1, tokens=1, metrics={}, phase_seconds={})


class Group:
    """Notes what happens to it."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    async def perform(self, order: Order, on_progress: Callable[[WorkerProgress], None]) -> WorkerResult:
        self.events.append(f"{self.name} performs {order.id}")
        return RESULT

    async def stop(self) -> None:
        self.events.append(f"{self.name} stops")


class Bench:
    """Warm groups over noted events."""

    def __init__(self, root: Path) -> None:
        self.state = StateDir(root)
        self.events: list[str] = []
        self.warm = self.make(idle_s=600)

    def make(self, idle_s: float) -> WarmGroup:
        return WarmGroup(
            self.state, lambda data, folder: Group(f"{folder.name}/{data}", self.events), idle_s=idle_s
        )

    async def perform(self, name: str, run_id: str) -> None:
        order = Order(id=name, work="evaluate", run_id=run_id, round=1, model_path="", assets_dir="", spec={})
        await self.warm.perform(order, "plays", lambda progress: None)


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


async def test_an_idle_group_is_let_go_and_comes_back_for_work(bench: Bench) -> None:
    bench.warm = bench.make(idle_s=0.05)
    await bench.perform("one", "a")
    await asyncio.sleep(0.2)
    assert bench.events[-1] == "a/plays stops"
    await bench.perform("two", "a")
    assert bench.events[-1] == "a/plays performs two"


async def test_work_in_time_keeps_a_group_from_being_let_go(bench: Bench) -> None:
    bench.warm = bench.make(idle_s=0.2)
    for number in range(6):
        await bench.perform(str(number), "a")
        await asyncio.sleep(0.06)
    assert "a/plays stops" not in bench.events


async def test_the_end_of_another_run_leaves_the_group(bench: Bench) -> None:
    await bench.perform("one", "a")
    await bench.warm.end_run("b", may_resume=False)
    assert bench.events == ["a/plays performs one"]


async def test_folders_of_runs_whose_end_was_never_heard_do_not_pile_up(bench: Bench) -> None:
    for number in range(groups_module.RUN_FOLDERS_KEPT + 3):
        await bench.perform("x", f"run-{number}")
        await asyncio.sleep(0.01)
    names = sorted(path.name for path in bench.state.runs.iterdir())
    assert names == ["run-3", "run-4", "run-5", "run-6"]
