"""What was measured in a run, as points of series.

The metrics of rounds and of sites' results stand in their rows, once each. The table of points holds
what no other row does: samples of training under way. They are for people to look at, so they are
written some seconds later and together, and if the database is away they are left out.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from fedloom_common.errors import AttemptFailed
from fedloom_common.runspec.evaluation import TRAIN_PREFIX
from fedloom_server.evaluation import before_of
from fedloom_server.federationrecords import MetricPoint
from fedloom_server.records import AssignmentState, Run, Work
from fedloom_server.store import Store
from fedloom_server.watching import Change, SiteProgress

FLUSH_S = 5.0
SLOWER_AFTER_POINTS = 20_000
"""With every so many points of a run its samples are half as frequent: a run of weeks has some 100,000."""
FLUSH_SAMPLES = 500
"""Of one flush; a thousand sites take two."""
LARGEST_STEP = 1 << 53
ALONE_LEAD = "alone_"
_LEADS = {Work.TRAIN: TRAIN_PREFIX, Work.EVALUATE: "", Work.ALONE: ALONE_LEAD}

Row = TypeVar("Row")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One number of a series."""

    round: int
    site: str
    """Empty for what holds over all sites."""
    name: str
    step: int
    """Of a sample; 0 for results."""
    value: float
    at_s: float


def points_of(store: Store, run: Run) -> Iterator[Point]:
    """Every point of a run, round by round: results over all sites, each site's, then samples."""
    samples = _by(store.metric_points(run.id), lambda sample: sample.round)
    done = [a for a in store.assignments(run.id) if a.state is AssignmentState.DONE]
    results = _by(done, lambda assignment: assignment.round)
    trainings = _by((a for a in done if a.work is Work.TRAIN), lambda assignment: assignment.base_round)
    for record in store.rounds(run.id):
        at_s, number = record.ended_at_s, record.number
        for name, value in record.metrics.items():
            yield Point(round=number, site="", name=name, step=0, value=value, at_s=at_s)
        for result in results.get(number, ()):
            if result.attempt != record.attempt:
                continue
            lead = _LEADS[result.work]
            for name, value in result.metrics.items():
                yield Point(round=number, site=result.site, name=lead + name, step=0, value=value, at_s=at_s)
        told = {a.site: before for a in trainings.get(number, ()) if (before := before_of(a)) is not None}
        for site, before in told.items():
            for name, value in before.metrics.items():
                yield Point(round=number, site=site, name=name, step=0, value=value, at_s=at_s)
        for sample in samples.get(number, ()):
            yield Point(
                round=number, site=sample.site, name=sample.name, step=sample.step, value=sample.value,
                at_s=sample.at_s,
            )  # fmt: skip


def _by(rows: Iterable[Row], round_of: Callable[[Row], int]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(round_of(row), []).append(row)
    return found


class Samples:
    """Writes samples of sites' progress: the latest of each assignment, every few seconds."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._latest: dict[tuple[str, str], tuple[SiteProgress, float]] = {}
        self._written: dict[str, int] = {}
        self._flushes = 0

    def note(self, run_id: str, change: Change) -> None:
        """Take a change of a run in; only progress with something measured is a sample."""
        if isinstance(change, SiteProgress) and (change.loss is not None or change.tokens_per_s is not None):
            self._latest[run_id, change.assignment_id] = change, time.time()

    async def keep_writing(self) -> None:
        """Write what has come, for ever."""
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    async def flush(self) -> None:
        """Write what has come, as far as it is its runs' turn."""
        self._flushes += 1
        due = [key for key in self._latest if self._is_turn_of(key[0])][:FLUSH_SAMPLES]
        samples = [(run_id, *self._latest.pop((run_id, name))) for run_id, name in due]
        points = [point for sample in samples for point in _points(*sample)]
        if not points:
            return
        try:
            await asyncio.to_thread(self._store.add, *points)
        except AttemptFailed as error:
            logger.debug("samples are left out", extra={"points": len(points), "reason": str(error)})
            return
        for point in points:
            self._written[point.run_id] = self._written.get(point.run_id, 0) + 1

    def _is_turn_of(self, run_id: str) -> bool:
        return self._flushes % (1 << self._written.get(run_id, 0) // SLOWER_AFTER_POINTS) == 0


def _points(run_id: str, progress: SiteProgress, at_s: float) -> Iterator[MetricPoint]:
    lead = ALONE_LEAD if progress.work is Work.ALONE else ""
    for name, value in (("step_loss", progress.loss), ("step_tokens_per_s", progress.tokens_per_s)):
        if value is not None and math.isfinite(value) and progress.done <= LARGEST_STEP:
            yield MetricPoint(
                run_id=run_id, round=progress.round, site=progress.site, name=lead + name, step=progress.done,
                value=value, at_s=at_s,
            )  # fmt: skip
