"""Assignments from the moment they are given until each has ended, by result, refusal or silence.

Rounds say what is to be done and wait here; the gRPC edge reports here what
sites answer. One notion of life: an assignment that makes progress is alive,
one that makes none for ``stall_s`` is lost.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fedloom_common.errors import NotPermitted, Unreachable, WrongState
from fedloom_common.partial import discard, held_bytes
from fedloom_server.failures import FAILED, failure_of
from fedloom_server.meters import Meters
from fedloom_server.patience import Patience
from fedloom_server.pending import Pending, Terms
from fedloom_server.records import Assignment, AssignmentState, Run, RunState, Work
from fedloom_server.results import Result, objection
from fedloom_server.sites import Sites
from fedloom_server.store import Store
from fedloom_server.turns import UploadTurns
from fedloom_server.watching import SiteProgress, Watching

MOST_ANNOUNCEMENTS = 5  # a site that lost its update trains again; without end they must not hold a round

logger = logging.getLogger(__name__)


class Assignments:
    """The open assignments of every run, by id."""

    def __init__(
        self,
        store: Store,
        sites: Sites,
        watching: Watching,
        meters: Meters,
        *,
        concurrent_uploads: int,
        staged_updates: int,
    ) -> None:
        self._store = store
        self._sites = sites
        self._watching = watching
        self._meters = meters
        self._open: dict[str, Pending] = {}
        self.staged_updates = staged_updates
        self.turns = UploadTurns(
            concurrent_uploads=concurrent_uploads,
            staged_updates=staged_updates,
            on_turn=self._grant,
            is_next=self._is_next,
            on_stuck=self._look_all,
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
        self.stage(batch)
        try:
            await self.see_through(run, batch, terms, on_end)
        finally:
            self.release(batch)

    async def see_through(
        self, run: Run, batch: Sequence[Assignment], terms: Terms, on_end: Callable[[], None]
    ) -> None:
        """Do as ``carry_out``, for a caller who stages and releases updates."""
        still = [assignment for assignment in batch if assignment.state is AssignmentState.OPEN]
        opened = [self._begin(run, assignment, still, terms, on_end) for assignment in still]
        patience = Patience(
            batch, opened, terms, end=self._end, is_held_up=self._is_held_up, is_connected=self._is_connected
        )
        try:
            await patience.until_over()
        except BaseException:
            for entry in opened:
                self._forget(entry)
            raise
        for entry in opened:
            entry.leave_behind()

    def stage(self, batch: Iterable[Assignment]) -> None:
        """Count the updates that lie on disk."""
        for assignment in batch:
            if assignment.has_spooled_update:
                self.turns.stage(assignment.id)

    def drop(self, run_id: str) -> None:
        """Wait for nothing of a run any more; what is open in the store stays so."""
        for entry in [entry for entry in self._open.values() if entry.run.id == run_id]:
            self._forget(entry)

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
        entry = self._open.get(assignment.id)
        if entry is not None:
            self._end(entry, AssignmentState.LOST, entry.why_lost(reason, is_connected=True))
            return
        assignment.state, assignment.reason = AssignmentState.LOST, reason
        self._save(assignment)
        discard(self._store.spool.update_path(assignment))
        self._tell(assignment, reason)

    def release(self, batch: Iterable[Assignment]) -> None:
        """Updates lie no longer on disk, or need no longer be waited for: others may arrive."""
        for assignment in batch:
            self.turns.release(assignment.id)

    def cancel(self, batch: Iterable[Assignment], reason: str) -> None:
        """End assignments whose result is no longer wanted."""
        for assignment in batch:
            if entry := self._open.get(assignment.id):
                self._end(entry, AssignmentState.CANCELLED, reason)

    def present(self, stored: Assignment) -> Assignment:
        """The assignment that a site works on, in place of what the store has of it; else the same."""
        entry = self._open.get(stored.id)
        return stored if entry is None else entry.assignment

    def attached(self, site: str, open_ids: Iterable[str] = (), kept_runs: Sequence[str] = ()) -> None:
        """Send a site its open assignments again: it may have missed them, or that others have ended."""
        self._tell_ended_runs(site, kept_runs)
        for assignment_id in open_ids:
            self._entry(site, assignment_id)
        for entry in self._of(site):
            self._send(entry)
        for assignment_id in open_ids:
            self._hold(site, assignment_id)

    def detached(self, site: str) -> None:
        """Let other sites upload in place of one that has gone."""
        for entry in self._of(site):
            self.turns.leave(entry.assignment.id)

    def progress(self, site: str, progress: SiteProgress) -> None:
        """A site says how far it has come; only what has moved is a sign of life."""
        entry = self._open.get(progress.assignment_id)
        if entry is None or entry.assignment.site != site:
            return  # it crossed with our word that the assignment has ended
        told = replace(progress, round=entry.assignment.round, work=entry.assignment.work)
        entry.told(told, _now_s())
        self._watching.tell(entry.run.id, told)

    def names(self, site: str, digest: str) -> bool:
        """Whether an assignment of a site, open or ended, names a file that it then may read."""
        for entry in self._of(site):
            delta, assets = entry.terms.delta, entry.run.assets
            known = {entry.assignment.model_digest, *(file["digest"] for file in assets)}
            if digest in known or (delta is not None and digest == delta.file.digest):
                return True
        return self._store.names_to(site, digest)

    def moved(self, site: str, *, down_bytes: int) -> None:
        """Bytes of a model went to a site: a sign of life of whatever it was asked to do."""
        self._meters.sent(site, down_bytes)
        for entry in self._of(site):
            entry.alive_at_s = _now_s()
        for entry in self._of(site)[:1]:
            entry.assignment.bytes_down += down_bytes

    def received(self, assignment: Assignment, up_bytes: int) -> None:
        """Bytes of an update have come."""
        self._meters.received(assignment.site, up_bytes)
        assignment.bytes_up += up_bytes
        if entry := self._open.get(assignment.id):
            entry.alive_at_s = _now_s()

    def finished(self, site: str, assignment_id: str, result: Result) -> None:
        """A site has finished: an evaluation ends here, a training waits for its upload."""
        entry = self._entry(site, assignment_id)
        if entry is None:
            return
        assignment = entry.assignment
        wrong = objection(
            result, assignment, entry.run.spec,
            most_update_bytes=entry.terms.most_update_bytes, data_bytes=self._data_bytes(entry),
        )  # fmt: skip
        if wrong is not None:
            self._reject(entry, wrong)
            return
        if assignment.update_digest and assignment.update_digest == result.update_digest:
            self.turns.ask(assignment.id)  # it asks again after a reconnect
            return
        entry.announcements += 1
        if entry.announcements > MOST_ANNOUNCEMENTS:
            self._reject(entry, f"it has announced {entry.announcements} different updates")
            return
        if assignment.update_digest:
            discard(self._store.spool.update_path(assignment))  # trained again, with other bytes
        assignment.examples, assignment.tokens = result.examples, result.tokens
        assignment.metrics, assignment.phase_seconds = dict(result.metrics), dict(result.phase_seconds)
        assignment.update_digest, assignment.update_bytes = result.update_digest, result.update_bytes
        if assignment.work is Work.EVALUATE:
            self._end(entry, AssignmentState.DONE)
            return
        entry.alive_at_s = _now_s()
        self._store.save(assignment)
        self.turns.ask(assignment.id)

    def refused(self, site: str, assignment_id: str, reason: str) -> None:
        """A site does not permit an assignment."""
        if entry := self._entry(site, assignment_id):
            self._end(entry, AssignmentState.REFUSED, reason)

    def failed(self, site: str, assignment_id: str, reason: str) -> None:
        """A site could not finish an assignment."""
        if entry := self._entry(site, assignment_id):
            self._end(entry, AssignmentState.FAILED, reason)

    def uploading(self, site: str, upload: str) -> Assignment:
        """The assignment whose update a site may send now, or has sent.

        Raises:
            NotPermitted: it is no upload of this site; whether it is another's, nobody is told.
            WrongState: it is not, or no longer, wanted.
            Unreachable: it will be, when its run goes on after a restart.
        """
        entry = self._open.get(upload)
        assignment = entry.assignment if entry else self._store.assignment(upload)
        if assignment is None or assignment.site != site:
            raise NotPermitted(f"this site has no upload {upload[:200]!r}")
        if assignment.state is AssignmentState.DONE:
            return assignment
        if entry is None and self._may_be_taken_up(site, assignment):
            raise Unreachable(f"the run of upload {upload} has yet to go on after a restart; try again")
        if entry is None or not assignment.update_digest:
            raise WrongState(
                f"upload {upload} is not wanted now: {assignment.reason or 'send its outcome first'}"
            )
        return assignment

    def delivered(self, assignment: Assignment, digest: str) -> None:
        """An update, by its digest, is whole, valid and on disk: it counts from now on.

        Raises:
            WrongState: the round went on, or the site announced another update, while this one was checked.
            Unreachable: the run has yet to go on after a restart.
        """
        current = self.uploading(assignment.site, assignment.id)
        if current.update_digest != digest:
            raise WrongState(f"upload {assignment.id} is {digest}, but the site has since announced another")
        if current.state is not AssignmentState.DONE:
            self._end(self._open[assignment.id], AssignmentState.DONE)

    def rejected(self, assignment: Assignment, reason: str) -> None:
        """An update is not valid and will not count."""
        if entry := self._open.get(assignment.id):
            self._reject(entry, reason)

    def troubled(self, assignment: Assignment, reason: str) -> None:
        """A transfer broke and may be tried again; the reason is told if the assignment stalls."""
        if entry := self._open.get(assignment.id):
            entry.trouble = reason
        logger.warning("upload interrupted", extra=_facts(assignment) | {"reason": reason})

    def withdraw(self, site: str, reason: str) -> None:
        """End what a site has been given: it may do no more."""
        for entry in self._of(site):
            self._end(entry, AssignmentState.CANCELLED, reason)

    def _tell_ended_runs(self, site: str, kept_runs: Sequence[str]) -> None:
        """Let a site clear away what it keeps of runs that ended, or went from our records, without it."""
        link = self._sites.link(site)
        states = {run.id: run.state for run in self._store.runs()} if link and kept_runs else {}
        for run_id in kept_runs:
            state = states.get(run_id)
            if link and (state is None or state.is_end):
                link.run_ended(run_id, may_resume=state in (RunState.FAILED, RunState.STOPPED))

    def _begin(
        self,
        run: Run,
        assignment: Assignment,
        batch: Sequence[Assignment],
        terms: Terms,
        on_end: Callable[[], None],
    ) -> Pending:
        if (entry := self._open.get(assignment.id)) is not None:  # late, and at work since an earlier round
            entry.batch, entry.on_end = batch, on_end
            return entry
        if assignment.staleness:
            terms = replace(terms, delta=None)  # it leads to another model
        entry = Pending(
            assignment=assignment, run=run, terms=terms, alive_at_s=_now_s(),
            ended=asyncio.get_running_loop().create_future(), batch=batch, on_end=on_end,
        )  # fmt: skip
        self._open[assignment.id] = entry
        if (refusal := self._sites.refusal(assignment.site)) is not None:
            self._end(entry, AssignmentState.CANCELLED, refusal)
        else:
            self._send(entry)
        return entry

    def _send(self, entry: Pending) -> None:
        if link := self._sites.link(entry.assignment.site):
            link.assign(entry.assignment, entry.run, entry.terms.delta)

    def _is_held_up(self, entry: Pending) -> bool:
        """Whether a site waits for its turn to upload, or does other work of ours first.

        That other work is lost in turn if it makes no progress.
        """
        assignment = entry.assignment
        if not self._is_connected(assignment.site):
            return False
        busy = entry.is_queued and any(not other.is_queued for other in self._of(assignment.site))
        return busy or self.turns.is_waiting(assignment.id)

    def _is_connected(self, site: str) -> bool:
        return self._sites.link(site) is not None

    def _reject(self, entry: Pending, reason: str) -> None:
        self._end(entry, AssignmentState.REJECTED, reason)

    def _end(self, entry: Pending, state: AssignmentState, reason: str = "") -> None:
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
            self.turns.stage(assignment.id)
        else:  # now, as a stream that still writes it must not have it open when others overwrite it
            discard(self._store.spool.update_path(assignment))
        self._forget(entry)
        self._meters.assignment_ended(assignment)
        self._revive_queued(assignment.site)
        if not entry.ended.done():
            entry.ended.set_result(None)
        entry.on_end()
        if state is AssignmentState.DONE:
            facts = _facts(assignment) | {
                "examples": assignment.examples,
                "loss": assignment.metrics.get("loss"),
            }
            logger.info("site done", extra=facts)
            return
        facts = _facts(assignment) | {"state": state, "reason": reason}
        logger.log(logging.WARNING if state in FAILED else logging.INFO, "site did not finish", extra=facts)
        self._tell(assignment, reason)

    def _save(self, assignment: Assignment) -> None:
        """An assignment that has ended, with a record of what went wrong if something did."""
        failure = failure_of(assignment)
        self._store.save(assignment, *([] if failure is None else [failure]))

    def _revive_queued(self, site: str) -> None:
        """A site's next work begins only now."""
        for entry in self._of(site):
            if entry.is_queued:
                entry.alive_at_s = _now_s()

    def _tell(self, assignment: Assignment, reason: str) -> None:
        """Say to a site that an assignment is no longer wanted."""
        if link := self._sites.link(assignment.site):
            link.cancel(assignment.id, reason)

    def _forget(self, entry: Pending) -> None:
        self._open.pop(entry.assignment.id, None)
        self.turns.leave(entry.assignment.id)

    @property
    def is_short_of_room(self) -> bool:
        """Whether sites wait for room that only folding can make, if it is of few updates."""
        return self.turns.is_stuck

    def _look_all(self) -> None:
        """Every run's folding is to look again: several may have a few updates each, and none enough."""
        for entry in list(self._open.values()):
            if entry.assignment.state is AssignmentState.OPEN:  # one that ends just now is told by itself
                entry.on_end()

    def _is_next(self, assignment_id: str) -> bool:
        """Whether others on disk wait for an update, as for the first of a cohort that is still open."""
        entry = self._open.get(assignment_id)
        if entry is not None and entry.terms.comes_first:
            return True
        if entry is None or not entry.run.spec.aggregation.deterministic:
            return False
        still = (other for other in entry.batch if other.state is AssignmentState.OPEN)
        return next(still, None) is entry.assignment

    def _grant(self, assignment_id: str) -> bool:
        entry = self._open.get(assignment_id)
        link = self._sites.link(entry.assignment.site) if entry else None
        if entry is None or link is None:
            return False  # it asks again when it is back
        entry.alive_at_s = _now_s()
        link.grant(assignment_id, self.held_bytes(entry.assignment))
        return True

    def held_bytes(self, assignment: Assignment) -> int:
        """Bytes of an update that are on disk; none of a larger file, whose mark a power cut has taken."""
        held = held_bytes(self._store.spool.update_path(assignment))
        return held if held <= assignment.update_bytes else 0

    def _data_bytes(self, entry: Pending) -> int:
        return self._sites.data_bytes(entry.assignment.site, entry.run.spec.data)

    def _of(self, site: str) -> list[Pending]:
        return [entry for entry in self._open.values() if entry.assignment.site == site]

    def _entry(self, site: str, assignment_id: str) -> Pending | None:
        """The open assignment that a site speaks of; tells the site what became of any other."""
        entry = self._open.get(assignment_id)
        if entry is not None and entry.assignment.site == site:
            return entry
        stored, link = self._store.assignment(assignment_id), self._sites.link(site)
        if link is None or (stored is not None and self._may_be_taken_up(site, stored)):
            return None
        if stored is not None and _counts(stored, site):
            link.cancel(assignment_id, "its update is here and counts", counts=True)
        else:
            link.cancel(assignment_id, "it is not, or no longer, wanted from this site")
        return None

    def _hold(self, site: str, assignment_id: str) -> None:
        """Ask a site for a finished training of a paused run, so that it keeps it."""
        stored, link = self._store.assignment(assignment_id), self._sites.link(site)
        if stored is None or link is None or not self._may_be_taken_up(site, stored):
            return
        run = self._store.run(stored.run_id)
        if run.state is RunState.PAUSED:
            link.assign(stored, run, None)

    def _may_be_taken_up(self, site: str, stored: Assignment) -> bool:
        """Whether a run that has yet to go on, after a restart or a pause, will want the assignment."""
        if stored.site != site or stored.state is not AssignmentState.OPEN:
            return False
        state = self._store.run(stored.run_id).state
        return state.goes_on_by_itself or (state is RunState.PAUSED and bool(stored.update_digest))


def _counts(assignment: Assignment, site: str) -> bool:
    """Whether an update of this site has come and counts."""
    return (
        assignment.site == site and assignment.work is Work.TRAIN and assignment.state is AssignmentState.DONE
    )


def _facts(assignment: Assignment) -> dict[str, object]:
    return {
        "run": assignment.run_id,
        "round": assignment.round,
        "site": assignment.site,
        "work": str(assignment.work),
    }


def _now_s() -> float:
    return asyncio.get_running_loop().time()
