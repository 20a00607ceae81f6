"""A coordinator and the daemons of all sites as objects of this process, over loopback.

Nothing is simulated but the worker groups' processes: rounds, cohorts, codecs, server steps, the sites'
training and all bytes between them are the product's own. Trainings take turns, so that a result does not
depend on how many sites share the machine.
"""

import asyncio
import hashlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fedloom_client.config import DataSource, SiteConfig
from fedloom_client.daemon import Daemon
from fedloom_common.runspec import RunSpec
from fedloom_server.app import Coordinator, coordinator
from fedloom_server.config import CoordinatorConfig, KeepModels
from fedloom_server.initialmodel import write_model
from fedloom_server.records import Run, RunState
from fedloom_server.store import Store
from learning.workbench import Workbench

ATTACH_S = 120
LOOK_S = 0.05

Sites = Mapping[str, Mapping[str, DataSource]]
"""Each site's data sets by name."""


class TrialFailed(Exception):
    """A run did not finish."""


class Federation:
    """A federation that trains one run after the other."""

    def __init__(self, running: Coordinator, workbench: Workbench, folder: Path) -> None:
        self._running, self._folder = running, folder
        self.workbench = workbench

    @property
    def store(self) -> Store:
        """The coordinator's records and models."""
        return self._running.store

    async def train(self, spec: RunSpec) -> Run:
        """Train a run to its end.

        Raises:
            TrialFailed: it stopped before, such as for a loss that is not finite.
        """
        initial = await asyncio.to_thread(self.initial, spec)
        copy = self._folder / "enqueued"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(initial, copy)  # its files move into the store
        return await self._ended(await self._running.runs.submissions.enqueue(spec, copy))

    async def measure(self, run: Run, spec: RunSpec) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """What the sites that have the data of ``spec`` measure of a run's last model: over all, and by site.

        Raises:
            TrialFailed: they did not.
        """
        content = spec.model_dump(mode="json")
        content |= {"stop": {"target": {"metric": "loss", "value": 1e300}}}  # any model is that good
        submissions = self._running.runs.submissions
        text = RunSpec.model_validate(content).model_dump_json()
        measured = await self._ended(await submissions.clone_from_model(run.id, text, None))
        by_site = {item.site: item.metrics for item in self.store.assignments(measured.id, 0)}
        return self.store.rounds(measured.id)[0].metrics, by_site

    def model(self, run: Run) -> Path:
        """A run's last model."""
        return self.store.files.path(self.store.run(run.id).model_digest)

    def initial(self, spec: RunSpec) -> Path:
        """The folder of a spec's initial model, made once; trials of one seed begin with the same."""
        text = f"{spec.model.model_dump_json()} {spec.task.model_dump_json()} {spec.seed}"
        folder = self._folder / "initial" / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            write_model(spec, partial)
            partial.rename(folder)
        return folder

    async def _ended(self, run: Run) -> Run:
        waits_since_s = None
        while not (run := self.store.run(run.id)).state.is_end:
            await asyncio.sleep(LOOK_S)
            if run.state is not RunState.WAITING:
                waits_since_s = None
            elif not run.reason.startswith("waits for sites"):  # every site failed: there is no use in more
                run = await self._running.runs.stop(run.id, run.reason)
                break
            else:  # on a busy machine a session may break, and comes back
                waits_since_s = waits_since_s or time.monotonic()
                if time.monotonic() - waits_since_s > ATTACH_S:
                    raise SystemExit(f"the trial {run.reason}; its sites did not come back in {ATTACH_S} s")
        if run.state is not RunState.FINISHED:
            raise TrialFailed(run.reason)
        return run


@asynccontextmanager
async def federation(sites: Sites, workbench: Workbench, folder: Path) -> AsyncIterator[Federation]:
    """A federation with its sites attached inside the block; the folder goes with its end."""
    config = CoordinatorConfig(
        listen="127.0.0.1:0", insecure=True, state_dir=folder / "coordinator", heartbeat_s=60, drain_s=0.2,
        keep_models=KeepModels(last=1, best=0),
    )  # fmt: skip
    async with coordinator(config) as running:
        tasks = [
            asyncio.create_task(_daemon(name, data, running.port, workbench, folder / name).run())
            for name, data in sites.items()
        ]
        try:
            await _attached(running, list(sites))
            _end_at_once(folder)  # in place of what the daemons have set
            yield Federation(running, workbench, folder)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    shutil.rmtree(folder, ignore_errors=True)


def _daemon(
    name: str, data: Mapping[str, DataSource], port: int, workbench: Workbench, folder: Path
) -> Daemon:
    config = SiteConfig.model_validate(
        {
            "coordinator": f"127.0.0.1:{port}",
            "insecure": name,
            "state_dir": folder,
            "data": dict(data),
            "workers": {"device": "cpu"},
            "cache_models": 1,
        }
    )

    def make_group(data_set: str, directory: Path) -> Any:
        return workbench.group(name, config.data[data_set], directory, folder / "packed" / data_set)

    return Daemon(config, make_group=make_group)


async def _attached(running: Coordinator, names: Sequence[str]) -> None:
    deadline_s = time.monotonic() + ATTACH_S
    while not all(running.sites.link(name) for name in names):
        if time.monotonic() > deadline_s:
            raise TrialFailed(f"the sites did not attach within {ATTACH_S} s")
        await asyncio.sleep(LOOK_S)


def _end_at_once(folder: Path) -> None:
    """Let Ctrl-C end the program: trials are saved, and each daemon would ask for a signal of its own."""

    def end() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(130)

    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, end)
