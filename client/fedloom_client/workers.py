"""The worker group as the daemon sees it: give it an order, get a result. No torch here.

    WorkerGroup ── starts ──► launcher (torchrun) ── starts, restarts ──► ranks
         └──────────────── Unix socket, JSON lines ──────────────────────► rank 0

The daemon listens, rank 0 connects and says ready, again after every restart.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedloom_client.config import DataSource, Workers
from fedloom_client.launches import Launched, RankZero
from fedloom_client.signs import signs_of_life
from fedloom_client.training.orders import Job, Order, Source, WorkerProgress, WorkerResult
from fedloom_common.errors import TrainingFailed

CANCEL_S = 10.0  # for the ranks to agree on a stop; a step that lasts longer is ended with its processes

logger = logging.getLogger(__name__)


class WorkerGroup:
    """The torchrun group of one run: started on first use, warm between orders."""

    def __init__(
        self, *, workers: Workers, source: DataSource, directory: Path, packed: Path | None = None
    ) -> None:
        """``directory`` is the run's own folder at the site: optimizer state, logs.

        ``packed`` is the data set's own, in which packed data outlives the run; by default in the other.
        """
        self._workers = workers
        self._source = Source(**source.model_dump())
        self._directory = directory
        self._packed = packed or directory / "data"
        self._launched: Launched | None = None
        self._turn = asyncio.Lock()

    async def perform(self, order: Order, on_progress: Callable[[WorkerProgress], None]) -> WorkerResult:
        """Do one order; orders wait for each other. Cancelling the caller stops the work, not the group.

        Raises:
            TrainingFailed: why it cannot be done, or the end of the failing rank's traceback after
                ``workers.max_restarts`` restarts.
        """
        async with self._turn:
            job = Job(
                order=order,
                source=self._source,
                directory=str(self._directory.absolute()),
                packed=str(self._packed.absolute()),
                sharding=self._workers.sharding,
            )
            started, lost = time.monotonic(), 0
            while True:
                rank = await self._ready_rank(lost, on_progress)
                ready_s = time.monotonic() - started
                result = await self._perform_on(rank, job, on_progress)
                if result is not None:
                    return replace(result, phase_seconds={"start": ready_s} | result.phase_seconds)
                lost += 1
                logger.warning("a rank died during an order", extra={"run": order.run_id, "lost": lost})
                on_progress(WorkerProgress(phase="start", done=lost))

    async def stop(self) -> None:
        """End the group's processes; the next order would start them again."""
        launched, self._launched = self._launched, None
        if launched is not None:
            await launched.stop()

    async def _ready_rank(self, lost: int, on_progress: Callable[[WorkerProgress], None]) -> RankZero:
        """The rank that takes orders, after ``lost`` deaths during this one.

        A launcher that ends has used up its restarts. If some of them went to earlier orders, or it ended
        between orders, another one gets what is left of this order's; so does the next after one that was
        killed, which counts as a death.
        """
        while True:
            if self._launched is None:
                on_progress(WorkerProgress(phase="start", done=lost))
                logger.info("the worker group starts", extra={"directory": str(self._directory)})
                restarts = max(0, self._workers.max_restarts - lost)
                self._launched = await Launched.start(self._workers, self._directory, restarts)
            launched = self._launched
            tell = partial(_tell_starting, on_progress, lost)
            async with signs_of_life(tell):
                rank = await launched.rank_zero()
            if rank is not None:
                return rank
            lost += launched.was_killed
            may_go_on = launched.has_served or launched.was_killed
            await self.stop()
            if lost > self._workers.max_restarts or not may_go_on:
                raise TrainingFailed(launched.reason())

    async def _perform_on(
        self, rank: RankZero, job: Job, on_progress: Callable[[WorkerProgress], None]
    ) -> WorkerResult | None:
        """The result; None if the rank died."""
        try:
            answer = await rank.ask(job, on_progress)
        except BaseException:  # cancelled, or on_progress raised: nobody waits for the result any more
            await self._call_off(rank, job.order.id)
            raise
        if answer is None:
            return None
        kind, body = answer
        if kind == "result":
            rank.has_served = True
            return WorkerResult.of(body)
        raise TrainingFailed(str(body))

    async def _call_off(self, rank: RankZero, order_id: str) -> None:
        stopped = False
        try:
            async with asyncio.timeout(CANCEL_S):
                stopped = await rank.call_off(order_id)
        except TimeoutError:
            logger.warning("the ranks did not stop in time and are ended", extra={"order": order_id})
        finally:
            if not stopped:
                await self.stop()


def _tell_starting(on_progress: Callable[[WorkerProgress], None], lost: int, beats: int) -> None:
    on_progress(WorkerProgress(phase="start", done=lost + beats))
