"""Fixtures for tests with a real coordinator; what they give lies in tests/bench.py and tests/fakesite.py."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import postgresql
import pytest
from bench import INITIAL, Bench, spec_of
from sitefaults import Fault

from fedloom_common.runspec import RunSpec
from fedloom_server.app import Coordinator, coordinator
from fedloom_server.config import CoordinatorConfig
from fedloom_server.pending import Pending
from fedloom_server.watching import SiteProgress


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgresql.Server]:
    """A real PostgreSQL server; started once, for those who use it."""
    with postgresql.server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return None
    url: str = request.getfixturevalue("postgres").new_database()
    return url


@pytest.fixture
def config(tmp_path: Path) -> CoordinatorConfig:
    return CoordinatorConfig(listen="127.0.0.1:0", insecure=True, state_dir=tmp_path / "state", drain_s=0.2)


@pytest.fixture
async def bench(config: CoordinatorConfig, tmp_path: Path) -> AsyncIterator[Bench]:
    async with coordinator(config) as running:
        bench = Bench(running, tmp_path / "sites")
        yield bench
        for name in bench.tasks:
            await bench.detach(name)


class Clock:
    """Time as the patience with sites sees it: only a test lets it pass, however busy the machine is."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What silence and deadlines of assignments are measured by."""
    clock = Clock()
    for room in ("assignments", "patience", "reports", "uploads"):
        monkeypatch.setattr(f"fedloom_server.{room}.now_s", clock)
    return clock


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[SiteProgress]:
    """What sites have said of their work, as the coordinator hears it."""
    heard: list[SiteProgress] = []
    take = Pending.told

    def noted(entry: Pending, progress: SiteProgress, now_s: float) -> None:
        take(entry, progress, now_s)
        heard.append(progress)

    monkeypatch.setattr(Pending, "told", noted)
    return heard


@pytest.fixture
def fault() -> type[Fault]:
    return Fault


@pytest.fixture
def spec() -> Callable[..., RunSpec]:
    return spec_of


@pytest.fixture
def initial() -> dict[str, np.ndarray]:
    return INITIAL


@pytest.fixture
async def bench_of(tmp_path: Path) -> AsyncIterator[Callable[[Coordinator], Bench]]:
    """For tests that start their coordinators themselves."""
    benches = []

    def make(running: Coordinator) -> Bench:
        benches.append(Bench(running, tmp_path / "sites"))
        return benches[-1]

    yield make
    for bench in benches:
        for name in bench.tasks:
            await bench.detach(name)
