"""A real coordinator on loopback, and the fake sites that are attached to it."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fakesite import FakeSite
from safetensors.numpy import load_file, save_file
from sitefaults import Fault

from fedloom_common.runspec import RunSpec
from fedloom_server.app import Coordinator
from fedloom_server.records import Run

WAIT_S = 60.0  # for what takes a moment, on a machine that may stand still for seconds

INITIAL = {
    "layer.weight": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "layer.bias": np.linspace(-1, 1, 4, dtype=np.float32),
}


def spec_of(**changes: object) -> RunSpec:
    content = {
        "name": "tiny",
        "model": {"config": {"model_type": "gpt2"}},
        "data": "text",
        "rounds": 1,
        "local": {"steps": 100, "batch_examples": 100},
        "cohort": {"stall_s": 60},
    }
    # Most tests count on a model's metrics with its round; those of ``before_training`` say so.
    evaluation = {"when": "after_round"} | dict(changes.pop("evaluation", {}))
    return RunSpec.model_validate(content | {"evaluation": evaluation} | changes)


class Bench:
    """A coordinator and its fake sites."""

    def __init__(self, running: Coordinator, folder: Path) -> None:
        self.running = running
        self.folder = folder
        self.sites: dict[str, FakeSite] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def site(
        self, name: str, *, step: float = 1.0, examples: int = 10, fault: Fault = Fault.NONE
    ) -> FakeSite:
        site = FakeSite(
            self.running.port, name, self.folder / name, step=step, examples=examples, fault=fault
        )
        return self.attach(site)

    def evaluator(self, name: str, loss: float) -> FakeSite:
        """A site that only measures, always the same."""
        site = FakeSite(self.running.port, name, self.folder / name, step=100.0, examples=5, fault=Fault.NONE)
        site.evaluates_only, site.measure = True, lambda tensors: loss
        return self.attach(site)

    def attach(self, site: FakeSite) -> FakeSite:
        site._port = self.running.port
        self.sites[site.name] = site
        self.tasks[site.name] = asyncio.create_task(site.attend())
        return site

    async def detach(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.wait([self.tasks[name]])

    async def enqueue(
        self, spec: RunSpec, tensors: dict[str, np.ndarray] | None = None, *, priority: int = 0
    ) -> Run:
        folder = self.folder / "initial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(tensors or INITIAL, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        return await self.running.runs.submissions.enqueue(spec, folder, priority=priority)

    async def until(self, holds: Callable[[], bool], seconds: float = WAIT_S) -> None:
        async with asyncio.timeout(seconds):
            while not holds():  # noqa: ASYNC110 (any condition at all)
                await asyncio.sleep(0.01)

    async def ended(self, run: Run, seconds: float = WAIT_S) -> Run:
        await self.until(lambda: self.running.store.run(run.id).state.is_end, seconds)
        return self.running.store.run(run.id)

    async def in_state(self, run: Run, *states: str) -> Run:
        await self.until(lambda: self.running.store.run(run.id).state in states)
        return self.running.store.run(run.id)

    async def waits(self, run: Run, why: str) -> Run:
        """The run as soon as it waits for a reason that holds a text."""
        await self.until(lambda: why in self.running.store.run(run.id).reason)
        return await self.in_state(run, "waiting")

    def model(self, run: Run) -> dict[str, np.ndarray]:
        store = self.running.store
        return load_file(store.files.path(store.run(run.id).model_digest))

    def outcomes(self, run: Run, number: int = 1) -> dict[str, tuple[str, str]]:
        """State and reason of each site's training in a round."""
        return {
            a.site: (str(a.state), a.reason)
            for a in self.running.store.assignments(run.id, number)
            if a.work == "train"
        }
