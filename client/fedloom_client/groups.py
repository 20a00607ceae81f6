"""The warm worker groups: one a run, let go when idle or when other runs need their place."""

import asyncio
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedloom_client.statedir import StateDir, safe_name
from fedloom_client.training.orders import CHECKPOINT, Order, WorkerProgress, WorkerResult

RUN_FOLDERS_KEPT = 32  # besides those in use: a coordinator tells at attach which runs have ended

logger = logging.getLogger(__name__)


class Group(Protocol):
    """The training processes of one run."""

    async def perform(self, order: Order, on_progress: Callable[[WorkerProgress], None]) -> WorkerResult: ...

    async def stop(self) -> None: ...


@dataclass(eq=False)
class _Warm:
    group: Group
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    idle: asyncio.Task[None] | None = None
    """Lets the group go after some time without work."""

    def rest(self) -> None:
        """Take back that the group is to be let go."""
        if self.idle is not None:
            self.idle.cancel()
        self.idle = None


class WarmGroups:
    """Keeps the groups of the runs that were worked on last."""

    def __init__(
        self, state: StateDir, make: Callable[[str, Path], Group], *, idle_s: float, most: int = 1
    ) -> None:
        """``make`` gives the group for a data set's name and the run's folder; ``most`` work at once."""
        self._idle_s = idle_s
        self._runs = state.runs
        self._make = make
        self._most = most
        self._warm: dict[str, _Warm] = {}
        """By run, the one that was worked on longest ago first."""
        self._changing = asyncio.Lock()

    async def perform(
        self, order: Order, data_set: str, on_progress: Callable[[WorkerProgress], None]
    ) -> WorkerResult:
        """Do an order with the run's group, which is started if it is not there.

        Raises:
            TrainingFailed: the group could not finish.
        """
        warm = await self._take(order.run_id, data_set)
        try:
            return await warm.group.perform(order, on_progress)
        finally:
            warm.idle = asyncio.create_task(self._stop_after(order.run_id, warm))
            warm.turn.release()

    async def end_run(self, run_id: str, *, may_resume: bool) -> None:
        """Let a run's group go, and what it kept, such as the optimizer's state, but not its logs.

        A run that may be resumed keeps its files: its next round goes on with the same optimizer.
        """
        async with self._changing:
            await self._let_go(run_id)
            if not may_resume:
                await asyncio.to_thread(_clear, self._runs / safe_name(run_id))

    def forget_checkpoint(self, run_id: str) -> None:
        """Remove what the run's training would have gone on from: its update is kept."""
        (self._runs / safe_name(run_id) / CHECKPOINT).unlink(missing_ok=True)

    def kept_runs(self) -> list[str]:
        """Names of the folders that runs have here: their ids, as far as these are plain names."""
        return [path.name for path in self._runs.iterdir()]

    async def stop(self) -> None:
        """End the processes."""
        async with self._changing:
            await asyncio.gather(*(self._let_go(run_id) for run_id in list(self._warm)))

    async def _take(self, run_id: str, data_set: str) -> _Warm:
        """The run's group, for the caller alone; one that nobody works with makes room for it."""
        async with self._changing:
            warm = self._warm.pop(run_id, None)
            if warm is None:
                await self._make_room()
                warm = _Warm(self._make(data_set, self._folder_of(run_id)))
            self._warm[run_id] = warm
            await warm.turn.acquire()
            warm.rest()
            return warm

    async def _make_room(self) -> None:
        idle = [run_id for run_id, warm in self._warm.items() if not warm.turn.locked()]
        for run_id in idle[: max(0, len(self._warm) + 1 - self._most)]:
            await self._let_go(run_id)

    async def _let_go(self, run_id: str) -> None:
        """End a run's group, after what it does now."""
        if (warm := self._warm.get(run_id)) is not None:
            async with warm.turn:
                warm.rest()
                del self._warm[run_id]
                await warm.group.stop()

    async def _stop_after(self, run_id: str, warm: _Warm) -> None:
        await asyncio.sleep(self._idle_s)
        async with self._changing:
            if self._warm.get(run_id) is warm and not warm.turn.locked():
                logger.info("the idle worker group is let go", extra={"run": run_id, "idle_s": self._idle_s})
                del self._warm[run_id]
                await warm.group.stop()

    def _folder_of(self, run_id: str) -> Path:
        folder = self._runs / safe_name(run_id)
        folder.mkdir(exist_ok=True)
        folder.touch()
        folders = sorted(self._runs.iterdir(), key=lambda path: -path.stat().st_mtime_ns)
        in_use = {safe_name(name) for name in self._warm}
        for old in folders[RUN_FOLDERS_KEPT + 1 :]:
            if old.name not in in_use:
                shutil.rmtree(old, ignore_errors=True)
        return folder


def _clear(folder: Path) -> None:
    for path in folder.iterdir() if folder.exists() else ():
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif path.name != "logs":
            shutil.rmtree(path, ignore_errors=True)
