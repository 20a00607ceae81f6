"""The warm worker group: one run's at a time, let go when it has been idle."""

import asyncio
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fedloom_client.statedir import StateDir, safe_name
from fedloom_client.training.orders import Order, WorkerProgress, WorkerResult

RUN_FOLDERS_KEPT = 4  # of runs whose end this site never heard

logger = logging.getLogger(__name__)


class Group(Protocol):
    """The training processes of one run."""

    async def perform(self, order: Order, on_progress: Callable[[WorkerProgress], None]) -> WorkerResult: ...

    async def stop(self) -> None: ...


class WarmGroup:
    """Keeps the group of the run that was worked on last."""

    def __init__(self, state: StateDir, make: Callable[[str, Path], Group], *, idle_s: float) -> None:
        """``make`` gives the group for a data set's name and the run's folder."""
        self._idle_s = idle_s
        self._runs = state.runs
        self._make = make
        self._run_id: str | None = None
        self._group: Group | None = None
        self._lock = asyncio.Lock()
        self._idle: asyncio.Task[None] | None = None

    async def perform(
        self, order: Order, data_set: str, on_progress: Callable[[WorkerProgress], None]
    ) -> WorkerResult:
        """Do an order with the run's group, which is started if it is not there.

        Raises:
            TrainingFailed: the group could not finish.
        """
        async with self._lock:
            self._rest(None)
            try:
                if self._group is None or self._run_id != order.run_id:
                    await self._let_go()
                    self._group, self._run_id = (
                        self._make(data_set, self._folder_of(order.run_id)),
                        order.run_id,
                    )
                return await self._group.perform(order, on_progress)
            finally:
                self._rest(self._idle_s)

    async def end_run(self, run_id: str, *, may_resume: bool) -> None:
        """Let a run's group go, and what it kept, such as the optimizer's state, but not its logs.

        A run that may be resumed keeps its files: its next round goes on with the same optimizer.
        """
        async with self._lock:
            if self._run_id == run_id:
                await self._let_go()
            if not may_resume:
                await asyncio.to_thread(_clear, self._runs / safe_name(run_id))

    def kept_runs(self) -> list[str]:
        """Names of the folders that runs have here: their ids, as far as these are plain names."""
        return [path.name for path in self._runs.iterdir()]

    async def stop(self) -> None:
        """End the processes."""
        async with self._lock:
            self._rest(None)
            await self._let_go()

    async def _let_go(self) -> None:
        group, self._group, self._run_id = self._group, None, None
        if group is not None:
            await group.stop()

    def _rest(self, idle_s: float | None) -> None:
        """Let the group go after some time without work; None takes that back."""
        if self._idle is not None:
            self._idle.cancel()
        self._idle = None if idle_s is None else asyncio.create_task(self._stop_after(idle_s))

    async def _stop_after(self, idle_s: float) -> None:
        await asyncio.sleep(idle_s)
        async with self._lock:
            logger.info("the idle worker group is let go", extra={"run": self._run_id, "idle_s": idle_s})
            await self._let_go()

    def _folder_of(self, run_id: str) -> Path:
        folder = self._runs / safe_name(run_id)
        folder.mkdir(exist_ok=True)
        folder.touch()
        folders = sorted(self._runs.iterdir(), key=lambda path: -path.stat().st_mtime_ns)
        for old in folders[RUN_FOLDERS_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        return folder


def _clear(folder: Path) -> None:
    for path in folder.iterdir() if folder.exists() else ():
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif path.name != "logs":
            shutil.rmtree(path, ignore_errors=True)
