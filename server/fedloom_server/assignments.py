"""Assignments from the moment they are given until each has ended, by result, refusal or silence.

Rounds say what is to be done and wait here; ``reports`` and ``uploads`` hear what sites answer. One
notion of life: an assignment that makes progress is alive, one that makes none for ``stall_s`` is lost.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fedloom_common.partial import discard
from fedloom_server.adapters.parts import part_digests
from fedloom_server.clock import now_s
from fedloom_server.failures import FAILED, failure_of
from fedloom_server.meters import Meters
from fedloom_server.patience import Patience
from fedloom_server.pending import OpenAssignments, Pending, Terms, facts_of
from fedloom_server.records import Assignment, AssignmentState, Run
from fedloom_server.references import names_to
from fedloom_server.sites import Sites
from fedloom_server.store import Store
from fedloom_server.uploads import Uploads

logger = logging.getLogger(__name__)


class Assignments:
    """The open assignments of every run, by id."""

    def __init__(
        self,
        store: Store,
        sites: Sites,
        meters: Meters,
        *,
        concurrent_uploads: int,
        staged_updates: int,
    ) -> None:
        self._store = store
        self._sites = sites
        self._meters = meters
        self.open = OpenAssignments()
        self.uploads = Uploads(
            store,
            sites,
            meters,
            self.open,
            end=self.end,
            concurrent_uploads=concurrent_uploads,
            staged_updates=staged_updates,
        )

    async def carry_out(
        self,
        run: Run,
        batch: Sequence[Assignment],
        terms: Terms,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Give assignments, in cohort order, to their sites and wait until nobody is waited for any more.

        That is when every one has ended, when enough are done, or at the deadline. Those of the batch that
        have ended before stay as they are. If this is cancelled the open ones stay open in the store, to be
        taken up again. ``on_end`` is called when one has ended.
        """
        if not terms.comes_first:
            self.uploads.stage(batch)
        try:
            await self.see_through(run, batch, terms, on_end)
        finally:
            self.uploads.release(batch)

    async def see_through(
        self, run: Run, batch: Sequence[Assignment], terms: Terms, on_end: Callable[[], None]
    ) -> None:
        """Do as ``carry_out``, for a caller who stages and releases updates."""
        still = [assignment for assignment in batch if assignment.state is AssignmentState.OPEN]
        try:
            opened = [self._begin(run, assignment, still, terms, on_end) for assignment in still]
            patience = Patience(
                batch, opened, terms,
                end=self.end, is_held_up=self._is_held_up, is_connected=self._is_connected,
            )  # fmt: skip
            await patience.until_over()
        except BaseException:
            for assignment in still:
                self._forget(assignment.id)
            raise
        for entry in opened:
            entry.leave_behind()

    def drop(self, run_id: str) -> None:
        """Wait for nothing of a run any more; what is open in the store stays so."""
        for entry in [entry for entry in self.open.values() if entry.run.id == run_id]:
            self._forget(entry.assignment.id)
        self.uploads.turns.release_all(f"{run_id}.")  # late ones that came and that no round has taken

    def call_off(self, run_id: str, reason: str) -> None:
        """Have sites stop what they do for a run, which will be asked for again.

        A training that a site has announced is finished: it keeps that until it is asked for again.
        """
        self.drop(run_id)
        for assignment in self._store.assignments(run_id):
            if assignment.state is AssignmentState.OPEN and not assignment.update_digest:
                self._tell(assignment, reason)

    def expire(self, assignment: Assignment, reason: str) -> None:
        """End an assignment whose update has become, or will be, of no use."""
        entry = self.open.get(assignment.id)
        if entry is not None:
            self.end(entry, AssignmentState.LOST, entry.why_lost(reason, is_connected=True))
            return
        assignment.state, assignment.reason = AssignmentState.LOST, reason
        self._save(assignment)
        discard(self._store.spool.update_path(assignment))
        self.uploads.release([assignment])
        self._tell(assignment, reason)

    def cancel(self, batch: Iterable[Assignment], reason: str) -> None:
        """End assignments whose result is no longer wanted."""
        for assignment in batch:
            if entry := self.open.get(assignment.id):
                self.end(entry, AssignmentState.CANCELLED, reason)

    def present(self, stored: Assignment) -> Assignment:
        """The assignment that a site works on, in place of what the store has of it; else the same."""
        entry = self.open.get(stored.id)
        return stored if entry is None else entry.assignment

    def names(self, site: str, digest: str) -> bool:
        """Whether an assignment of a site, open or ended, names a file that it then may read."""
        for entry in self.open.of(site):
            delta, assets = entry.terms.delta, entry.run.assets
            known = {entry.assignment.model_digest, *(file["digest"] for file in assets)}
            known |= part_digests(entry.run) | {file.digest for file in entry.terms.folds}
            if digest in known or (delta is not None and digest == delta.file.digest):
                return True
        return names_to(self._store.database, site, digest)

    def moved(self, site: str, *, down_bytes: int) -> None:
        """Bytes of a model went to a site: a sign of life of whatever it was asked to do."""
        self._meters.sent(site, down_bytes)
        given = self.open.of(site)
        for entry in given:
            entry.alive_at_s = now_s()
        if given:
            given[0].assignment.bytes_down += down_bytes

    def withdraw(self, site: str, reason: str) -> None:
        """End what a site has been given: it may do no more."""
        for entry in self.open.of(site):
            self.end(entry, AssignmentState.CANCELLED, reason)

    def send(self, entry: Pending) -> None:
        """Give an open assignment to its site, or give it again; not while it is not connected."""
        if link := self._sites.link(entry.assignment.site):
            terms = entry.terms
            link.assign(entry.assignment, entry.run, terms.delta, terms.folds, entry.counted_round)

    def end(self, entry: Pending, state: AssignmentState, reason: str = "") -> None:
        """The one place where an assignment ends: in the store first, then for those who wait."""
        assignment = entry.assignment
        assignment.state, assignment.reason = state, reason
        was_late = assignment.is_late
        assignment.is_late = was_late and state is AssignmentState.DONE
        try:
            self._save(assignment)
        except Exception:
            assignment.state, assignment.reason, assignment.is_late = AssignmentState.OPEN, "", was_late
            raise
        if assignment.has_spooled_update:
            if not entry.terms.comes_first:
                self.uploads.turns.stage(assignment.id)
        else:  # now, as a stream that still writes it must not have it open when others overwrite it
            discard(self._store.spool.update_path(assignment))
        self._forget(entry.assignment.id)
        self._meters.assignment_ended(assignment)
        self._revive_queued(assignment.site)
        if not entry.ended.done():
            entry.ended.set_result(None)
        entry.on_end()
        if state is AssignmentState.DONE:
            facts = facts_of(assignment) | {
                "examples": assignment.examples,
                "loss": assignment.metrics.get("loss"),
            }
            logger.info("site done", extra=facts)
            return
        facts = facts_of(assignment) | {"state": state, "reason": reason}
        logger.log(logging.WARNING if state in FAILED else logging.INFO, "site did not finish", extra=facts)
        self._tell(assignment, reason)

    def _begin(
        self,
        run: Run,
        assignment: Assignment,
        batch: Sequence[Assignment],
        terms: Terms,
        on_end: Callable[[], None],
    ) -> Pending:
        if (entry := self.open.get(assignment.id)) is not None:  # late, and at work since an earlier round
            entry.batch, entry.on_end = batch, on_end
            return entry
        if assignment.staleness:
            terms = replace(terms, delta=None)  # it leads to another model
        entry = Pending(
            assignment=assignment, run=run, terms=terms, alive_at_s=now_s(),
            ended=asyncio.get_running_loop().create_future(), batch=batch, on_end=on_end,
        )  # fmt: skip
        self.open[assignment.id] = entry
        if (refusal := self._sites.refusal(assignment.site)) is not None:
            self.end(entry, AssignmentState.CANCELLED, refusal)
        else:
            self.send(entry)
        return entry

    def _is_held_up(self, entry: Pending) -> bool:
        """Whether a site waits for its turn to upload, or does other work of ours first.

        That other work is lost in turn if it makes no progress.
        """
        assignment = entry.assignment
        if not self._is_connected(assignment.site):
            return False
        busy = entry.is_queued and any(not other.is_queued for other in self.open.of(assignment.site))
        return busy or self.uploads.turns.is_waiting(assignment.id)

    def _is_connected(self, site: str) -> bool:
        return self._sites.link(site) is not None

    def _save(self, assignment: Assignment) -> None:
        """An assignment that has ended, with a record of what went wrong if something did."""
        failure = failure_of(assignment)
        self._store.save(assignment, *([] if failure is None else [failure]))

    def _revive_queued(self, site: str) -> None:
        """A site's next work begins only now."""
        for entry in self.open.of(site):
            if entry.is_queued:
                entry.alive_at_s = now_s()

    def _tell(self, assignment: Assignment, reason: str) -> None:
        """Say to a site that an assignment is no longer wanted."""
        if link := self._sites.link(assignment.site):
            link.cancel(assignment.id, reason)

    def _forget(self, assignment_id: str) -> None:
        self.open.pop(assignment_id, None)
        self.uploads.turns.leave(assignment_id)
