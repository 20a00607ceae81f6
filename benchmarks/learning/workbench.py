"""Worker groups in this process: one rank each, which take turns: a training has all cores of its trial."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fedloom_client.config import DataSource
from fedloom_client.training.group import Group
from fedloom_client.training.orders import Job, Order, Source, WorkerProgress, WorkerResult
from fedloom_client.training.service import WarmRank
from fedloom_common.errors import TrainingFailed


class Workbench:
    """The one place where all sites train, site after site."""

    def __init__(self, *, device: str, warm: int, threads: int) -> None:
        """``warm`` models are kept between orders, of the sites that worked last."""
        torch.set_num_threads(threads)
        self._device, self._most = torch.device(device), warm
        self._warm: OrderedDict[object, WarmRank] = OrderedDict()
        self._turns = ThreadPoolExecutor(1, thread_name_prefix="training")
        self.dropout = 0.0
        """Share of trainings that fail, as if their sites had gone."""

    def group(self, site: str, source: DataSource, directory: Path, packed: Path) -> "SiteGroup":
        """The worker group of one run at one site."""
        return SiteGroup(self, site, Source(**source.model_dump()), directory, packed)

    async def do(
        self, group: "SiteGroup", job: Job, on_progress: Callable[[WorkerProgress], None]
    ) -> WorkerResult:
        """Do a job when it is its turn."""
        loop = asyncio.get_running_loop()

        def report(progress: WorkerProgress) -> None:
            loop.call_soon_threadsafe(on_progress, progress)

        def perform() -> WorkerResult:
            group.report = report
            return self._rank(group).perform(job)

        return await loop.run_in_executor(self._turns, perform)

    def forget(self, group: "SiteGroup") -> None:
        """Keep nothing of a group warm."""
        self._turns.submit(self._warm.pop, group, None)

    def close(self) -> None:
        """End after the job under way."""
        self._turns.shutdown()
        self._warm.clear()

    def _rank(self, group: "SiteGroup") -> WarmRank:
        rank = self._warm.pop(group, None)
        while len(self._warm) >= self._most:  # before the new model comes
            self._warm.popitem(last=False)
        if rank is None:
            rank = WarmRank(Group(0, 1, self._device, None), lambda progress: group.report(progress))
        self._warm[group] = rank
        return rank


class SiteGroup:
    """What a daemon takes for its torchrun group."""

    def __init__(self, bench: Workbench, site: str, source: Source, directory: Path, packed: Path) -> None:
        self._bench, self._site, self._source = bench, site, source
        self._directory, self._packed = directory, packed
        self.report: Callable[[WorkerProgress], None] = lambda progress: None

    async def perform(self, order: Order, on_progress: Callable[[WorkerProgress], None]) -> WorkerResult:
        """Do one order.

        Raises:
            TrainingFailed: also where the site drops out.
        """
        if order.work == "train" and drops_out(order, self._site, self._bench.dropout):
            raise TrainingFailed("the site dropped out, as the trial asks")
        job = Job(order=order, source=self._source, directory=str(self._directory), packed=str(self._packed))
        return await self._bench.do(self, job, on_progress)

    async def stop(self) -> None:
        """Let the model go."""
        self._bench.forget(self)


def drops_out(order: Order, site: str, share: float) -> bool:
    """Whether a site is gone in an attempt at a round: at random, and the same in every run of a seed."""
    attempt = order.id.removeprefix(order.run_id)
    digest = hashlib.sha256(f"{order.spec['seed']}/{site}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:6]) < share * (1 << 48)
