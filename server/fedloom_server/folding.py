"""A round's updates on their way into the next model: some are folded while others still arrive.

A group is folded at once, since every fold reads and writes the sum of all so far. What is
folded leaves the disk and makes room for sites that wait to upload. A rule that looks at all
updates at once folds none: they lie on disk together, and no site waits for room.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fedloom_common.digests import digest_of_file, has_digest
from fedloom_common.errors import FederationError, StorageUnavailable
from fedloom_common.partial import discard
from fedloom_common.runspec import Scaffold
from fedloom_common.threads import until_done
from fedloom_server.adapters.merging import Merge
from fedloom_server.adapters.updates import Given
from fedloom_server.aggregation import FoldingAggregator, Update, aggregator_for
from fedloom_server.aggregation.controls import Census, settle_controls
from fedloom_server.downlink import Published
from fedloom_server.globalmodel import make_model
from fedloom_server.records import Assignment, AssignmentState, Round, Run
from fedloom_server.store import Store
from fedloom_server.updates import Updates
from fedloom_server.uploads import Uploads

FOLD_UPDATES = 4  # folded at once: with fewer, reading and writing the sum outweighs reading the updates

logger = logging.getLogger(__name__)


def folds_early(run: Run, record: Round, store: Store) -> bool:
    """Whether updates of a round are folded while others are awaited."""
    return _rule_folds(run) and not Updates(run, record, store).count_together


class Folding:
    """Folds the updates of one attempt at a round."""

    def __init__(self, run: Run, record: Round, store: Store, uploads: Uploads) -> None:
        self._run, self._record = run, record
        self._store, self._uploads = store, uploads
        self._rule = aggregator_for(run.spec.aggregation, run.spec.transport.up, record.base_digest)
        adapter = run.spec.model.adapter
        self._merge = Merge(store, run, record) if adapter and adapter.needs_all_updates else None
        self._updates = Updates(run, record, store)
        self._folds_early = folds_early(run, record, store)
        self._is_in_order = run.spec.aggregation.deterministic
        self._batch: Sequence[Assignment] = ()
        self._is_awaited = self._some_are_open
        self._changed = asyncio.Event()
        self._is_over = self._is_hindered = False
        self._working: asyncio.Task[None] | None = None

    async def begin(self, batch: Sequence[Assignment], is_awaited: Callable[[], bool] | None = None) -> None:
        """Fold updates of these assignments, in cohort order, as soon as there are enough.

        ``is_awaited`` tells whether more updates are to come; if not given, those of open assignments are.
        Updates and sums are not synced to disk as they come: those of an earlier process are checked,
        and the assignments of what a power cut has spoilt are open again.
        """
        self._batch = batch
        if is_awaited is not None:
            self._is_awaited = is_awaited
        spoilt = await until_done(self._spoilt)
        for assignment in spoilt:
            logger.warning("an update was lost and is asked for again", extra={"assignment": assignment.id})
            discard(self._store.spool.update_path(assignment))
            assignment.state, assignment.update_digest, assignment.is_folded = AssignmentState.OPEN, "", False
            assignment.update_norm = 0.0
        if spoilt:
            self._store.save(self._record, *spoilt)
        self._working = asyncio.create_task(self._work(), name="folding")

    def look(self) -> None:
        """An assignment has ended."""
        self._changed.set()
        if self._is_hindered:
            self._uploads.release(self._batch)

    async def end(self) -> None:
        """Fold no further; returns when a fold that is under way has ended."""
        self._is_over = True
        self._changed.set()
        if self._working is not None:
            await self._working

    async def aggregate(self, done: Sequence[Assignment]) -> Published:
        """Take the mean of what was folded and of what was not, and make it the model that sites are told."""
        measured = await until_done(self._updates.measure, [one for one in done if not one.is_folded])
        if measured:
            self._store.save(*measured)
        return await until_done(self._aggregate, done)

    def _aggregate(self, done: Sequence[Assignment]) -> Published:
        updates = self._updates.of([assignment for assignment in done if not assignment.is_folded])
        base = self._store.files.path(self._record.base_digest)
        out, parts = self._store.spool.mean_path(self._run.id, self._record.number), None
        if self._merge is None or not self._merge.replaces_mean:
            self._take_mean(base, updates, out)
        if self._merge is not None:
            given = Given(
                updates=updates, models=self._updates.models(done), stages=self._run.spec.transport.up
            )
            parts = self._merge.merge(given, base, out)
        if isinstance(self._run.spec.local.algorithm, Scaffold):
            self._settle_controls(done, base, out)
        return replace(make_model(self._store, self._run, self._record, out), parts=parts)

    def _settle_controls(self, done: Sequence[Assignment], base: Path, out: Path) -> None:
        weights = {update.site: update.examples for update in self._updates.of(done)}
        earlier = self._store.round(self._run.id, self._record.number - 1)
        # A release that kept none left nothing to go by: its sites are taken to weigh as these do.
        known = (earlier.control_weights or (weights if earlier.population else {})) if earlier else {}
        before = Census(sites=earlier.population if earlier else 0, weights=known)
        self._record.control_weights = known | weights
        # Who is away for a round is still one of N: c goes on from what all have given it.
        self._record.population = max(self._record.population, before.sites)
        after = Census(sites=self._record.population, weights=self._record.control_weights)
        share = sum(weights.values()) / after.total
        settle_controls(out, base, kept=before.total / after.total, share=share)

    def _take_mean(self, base: Path, updates: Sequence[Update], out: Path) -> None:
        if isinstance(self._rule, FoldingAggregator):
            self._rule.aggregate(base, updates, out, earlier=self._earlier())
        else:
            self._rule.aggregate(base, updates, out)

    async def _work(self) -> None:
        if not self._folds_early:
            return
        try:
            while not self._is_over:
                group = self._ready()
                if group:
                    await self._fold(group)
                else:
                    await self._changed.wait()
                    self._changed.clear()
        except StorageUnavailable:
            raise  # what the database holds is not known: the run goes on from there when it is back
        except (FederationError, OSError, MemoryError):
            logger.warning("updates are folded at the end of the round instead", exc_info=True)
        finally:  # whatever ended it, sites must not wait for room that nobody makes
            self._is_hindered = True
            self.look()

    def _ready(self) -> list[Assignment]:
        """A group that is worth folding now; when nobody is left to wait for, the mean is taken at once."""
        ready: list[Assignment] = []
        for assignment in self._batch:
            if assignment.state is AssignmentState.OPEN and self._is_in_order:
                break
            if assignment.has_spooled_update:
                ready.append(assignment)
        enough = min(FOLD_UPDATES, max(1, self._uploads.staged_updates // 2))
        if self._uploads.is_short_of_room:  # other runs' updates take it: these may never be enough
            enough = 1
        return ready if len(ready) >= enough and self._is_awaited() else []

    def _some_are_open(self) -> bool:
        return any(assignment.state is AssignmentState.OPEN for assignment in self._batch)

    async def _fold(self, group: list[Assignment]) -> None:
        """Replace updates and the sum so far by a new sum; a row names it before anything is removed."""
        base = self._store.files.path(self._record.base_digest)
        out = self._store.spool.folder / f"{group[0].id}.sum"
        await until_done(self._updates.measure, group)
        updates, earlier = self._updates.of(group), self._earlier()
        digest = await until_done(self._make_sum, base, updates, out, earlier)
        self._save_fold(group, digest)
        for update in updates:
            self._store.spool.spares.keep(update.path)
        if earlier is not None:
            earlier.unlink()
        self._uploads.release(group)
        logger.debug("updates folded", extra={"run": self._run.id, "round": self._record.number})

    def _save_fold(self, group: list[Assignment], digest: str) -> None:
        """All or nothing: a sum that is saved later, without its updates, would count them twice."""
        before, self._record.sum_digest = self._record.sum_digest, digest
        for assignment in group:
            assignment.is_folded = True
        try:
            self._store.save(self._record, *group)
        except Exception:
            self._record.sum_digest = before
            for assignment in group:
                assignment.is_folded = False
            raise

    def _make_sum(self, base: Path, updates: Sequence[Update], out: Path, earlier: Path | None) -> str:
        assert isinstance(self._rule, FoldingAggregator), "nothing else is folded"
        self._rule.fold(base, updates, out, earlier=earlier)
        digest = digest_of_file(out)
        out.replace(self._store.spool.sum_path(self._run.id, digest))
        return digest

    def _earlier(self) -> Path | None:
        digest = self._record.sum_digest
        return self._store.spool.sum_path(self._run.id, digest) if digest else None

    def _spoilt(self) -> list[Assignment]:
        """Assignments whose update counted but is no longer what it was."""
        earlier = self._earlier()
        sum_is_good = earlier is None or has_digest(earlier, self._record.sum_digest)
        if not sum_is_good:
            self._record.sum_digest = ""
        return [
            assignment
            for assignment in self._batch
            if assignment.state is AssignmentState.DONE and not self._is_there(assignment, sum_is_good)
        ]

    def _is_there(self, assignment: Assignment, sum_is_good: bool) -> bool:
        if assignment.is_folded:
            return sum_is_good
        return has_digest(self._store.spool.update_path(assignment), assignment.update_digest)


def _rule_folds(run: Run) -> bool:
    adapter = run.spec.model.adapter
    if adapter is not None and adapter.needs_all_updates:
        return False
    return isinstance(aggregator_for(run.spec.aggregation), FoldingAggregator)
