"""Assignments from the moment they are given until each has ended, by result, refusal or silence.

Rounds say what is to be done and wait here; the gRPC edge reports here what
sites answer. One notion of life: an assignment that makes progress is alive,
one that makes none for ``stall_s`` is lost.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedloom_common.digests import DIGEST, is_digest
from fedloom_common.errors import NotPermitted, Unreachable, WrongState
from fedloom_common.partial import discard, held_bytes
from fedloom_server.downlink import Delta
from fedloom_server.meters import Meters
from fedloom_server.records import Assignment, AssignmentState, Run, RunState, Work
from fedloom_server.sites import Sites
from fedloom_server.store import Store
from fedloom_server.turns import UploadTurns
from fedloom_server.watching import SiteProgress, Watching

WORKING_PHASES = frozenset({"start", "prepare", "train", "evaluate"})
"""Phases whose progress the site alone can tell; transfers are alive by the bytes that we see."""

MOST_ANNOUNCEMENTS = (
    5  # a site that lost its update trains again; endless announcements must not hold a round
)

LARGEST_COUNT = 1 << 53  # beyond it a count is no longer exact as a float, nor ever honest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What holds for every assignment of a batch: how long it is waited for, and what may pass."""

    needed: int
    """Results without which the rest is not worth waiting for."""
    deadline_s: float | None
    """Seconds after which what is open is lost."""
    stall_s: float
    """Seconds without progress after which an assignment is lost."""
    most_update_bytes: int = 0
    """Size of the largest file that an update of the batch's model can be."""
    delta: Delta | None = None
    """A smaller way to the batch's model."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a site says of its finished work."""

    examples: int
    tokens: int
    metrics: Mapping[str, float]
    phase_seconds: Mapping[str, float]
    update_digest: str = ""
    update_bytes: int = 0


@dataclass(kw_only=True, eq=False)
class _Open:
    """An assignment that has not ended."""

    assignment: Assignment
    run: Run
    terms: Terms
    alive_at_s: float
    ended: asyncio.Future[None]
    batch: Sequence[Assignment]
    """All that were open with it, in cohort order."""
    on_end: Callable[[], None]
    last: SiteProgress | None = None
    announcements: int = 0
    """Different updates that the site has said it will send."""
    trouble: str = ""
    """The latest error of a transfer that may yet be retried."""


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
        self._open: dict[str, _Open] = {}
        self.staged_updates = staged_updates
        self.turns = UploadTurns(
            concurrent_uploads=concurrent_uploads,
            staged_updates=staged_updates,
            on_turn=self._grant,
            is_next=self._is_next,
        )

    async def carry_out(
        self,
        run: Run,
        batch: Sequence[Assignment],
        terms: Terms,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Give assignments, in cohort order, to their sites and wait until every one has ended.

        Those of the batch that have ended before stay as they are. If this is
        cancelled the open ones stay open in the store, to be taken up again.
        ``on_end`` is called when one has ended.
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
        try:
            await self._until_ended(batch, opened, terms)
        finally:
            for entry in opened:
                self._forget(entry)

    def stage(self, batch: Iterable[Assignment]) -> None:
        """Count the updates that lie on disk."""
        for assignment in batch:
            if assignment.has_spooled_update:
                self.turns.stage(assignment.id)

    def release(self, batch: Iterable[Assignment]) -> None:
        """Updates lie no longer on disk, or need no longer be waited for: others may arrive."""
        for assignment in batch:
            self.turns.release(assignment.id)

    def cancel(self, batch: Iterable[Assignment], reason: str) -> None:
        """End assignments whose result is no longer wanted."""
        for assignment in batch:
            if entry := self._open.get(assignment.id):
                self._end(entry, AssignmentState.CANCELLED, reason)

    def attached(self, site: str, open_ids: Iterable[str] = (), kept_runs: Sequence[str] = ()) -> None:
        """Send a site its open assignments again: it may have missed them, or that others have ended."""
        self._tell_ended_runs(site, kept_runs)
        for assignment_id in open_ids:
            self._entry(site, assignment_id)
        for entry in self._of(site):
            self._send(entry)

    def detached(self, site: str) -> None:
        """Let other sites upload in place of one that has gone."""
        for entry in self._of(site):
            self.turns.leave(entry.assignment.id)

    def progress(self, site: str, progress: SiteProgress) -> None:
        """A site says how far it has come; only what has moved is a sign of life."""
        entry = self._open.get(progress.assignment_id)
        if entry is None or entry.assignment.site != site:
            return  # it crossed with our word that the assignment has ended
        moved = entry.last is None or (progress.phase, progress.done) != (entry.last.phase, entry.last.done)
        if moved and progress.phase in WORKING_PHASES:
            entry.alive_at_s = _now_s()
        entry.last = replace(progress, round=entry.assignment.round, work=entry.assignment.work)
        self._watching.tell(entry.run.id, entry.last)

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
        if (wrong := _objection(result, entry, self._data_bytes(entry))) is not None:
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
    ) -> _Open:
        entry = _Open(
            assignment=assignment, run=run, terms=terms, alive_at_s=_now_s(),
            ended=asyncio.get_running_loop().create_future(), batch=batch, on_end=on_end,
        )  # fmt: skip
        self._open[assignment.id] = entry
        if (refusal := self._sites.refusal(assignment.site)) is not None:
            self._end(entry, AssignmentState.CANCELLED, refusal)
        else:
            self._send(entry)
        return entry

    def _send(self, entry: _Open) -> None:
        if link := self._sites.link(entry.assignment.site):
            link.assign(entry.assignment, entry.run, entry.terms.delta)

    async def _until_ended(self, batch: Sequence[Assignment], opened: list[_Open], terms: Terms) -> None:
        deadline_at_s = _now_s() + (terms.deadline_s or math.inf)
        while still := [entry for entry in opened if not entry.ended.done()]:
            done = sum(assignment.state is AssignmentState.DONE for assignment in batch)
            if done + len(still) < terms.needed:
                self._give_up(
                    still, f"{terms.needed} results are needed and only {done + len(still)} can still come"
                )
                return
            wake_at_s = min(deadline_at_s, *(entry.alive_at_s + terms.stall_s for entry in still))
            timeout_s = None if math.isinf(wake_at_s) else max(0.0, wake_at_s - _now_s())
            await asyncio.wait(
                [entry.ended for entry in still], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            self._lose_silent(opened, deadline_at_s)

    def _lose_silent(self, opened: list[_Open], deadline_at_s: float) -> None:
        now_s = _now_s()
        for entry in opened:
            if entry.ended.done():
                continue
            if self.turns.is_waiting(entry.assignment.id) and self._sites.link(entry.assignment.site):
                entry.alive_at_s = now_s  # it waits for us
            stall_s = entry.terms.stall_s
            if now_s >= deadline_at_s:
                self._lose(entry, f"not finished by the deadline of {entry.terms.deadline_s:g} s")
            elif now_s >= entry.alive_at_s + stall_s:
                self._lose(entry, f"no progress for {stall_s:g} s")

    def _lose(self, entry: _Open, reason: str) -> None:
        if entry.last is not None:
            reason += (
                f"; last seen in {entry.last.phase}, {entry.last.done} of {entry.last.total or '?'} done"
            )
        if self._sites.link(entry.assignment.site) is None:
            reason += "; the site is not connected"
        if entry.trouble:
            reason += f"; last error: {entry.trouble}"
        self._end(entry, AssignmentState.LOST, reason)

    def _give_up(self, entries: list[_Open], reason: str) -> None:
        for entry in entries:
            self._end(entry, AssignmentState.CANCELLED, reason)

    def _reject(self, entry: _Open, reason: str) -> None:
        self._end(entry, AssignmentState.REJECTED, reason)

    def _end(self, entry: _Open, state: AssignmentState, reason: str = "") -> None:
        """The one place where an assignment ends: in the store first, then for those who wait."""
        assignment = entry.assignment
        assignment.state, assignment.reason = state, reason
        try:
            self._store.save(assignment)
        except Exception:
            assignment.state, assignment.reason = AssignmentState.OPEN, ""
            raise
        if assignment.has_spooled_update:
            self.turns.stage(assignment.id)
        else:  # now, as a stream that still writes it must not have it open when others overwrite it
            discard(self._store.spool.update_path(assignment))
        self._forget(entry)
        self._meters.assignment_ended(assignment)
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
        logger.warning("site did not finish", extra=_facts(assignment) | {"state": state, "reason": reason})
        if link := self._sites.link(assignment.site):
            link.cancel(assignment.id, reason)

    def _forget(self, entry: _Open) -> None:
        self._open.pop(entry.assignment.id, None)
        self.turns.leave(entry.assignment.id)

    def _is_next(self, assignment_id: str) -> bool:
        """Whether the fold waits for an update: the first of the cohort that is still open."""
        entry = self._open.get(assignment_id)
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

    def _data_bytes(self, entry: _Open) -> int:
        return self._sites.data_bytes(entry.assignment.site, entry.run.spec.data)

    def _of(self, site: str) -> list[_Open]:
        return [entry for entry in self._open.values() if entry.assignment.site == site]

    def _entry(self, site: str, assignment_id: str) -> _Open | None:
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

    def _may_be_taken_up(self, site: str, stored: Assignment) -> bool:
        """Whether a run that has yet to go on after a restart will want the assignment."""
        if stored.site != site or stored.state is not AssignmentState.OPEN:
            return False
        return self._store.run(stored.run_id).state in (RunState.RUNNING, RunState.QUEUED)


def _counts(assignment: Assignment, site: str) -> bool:
    """Whether an update of this site has come and counts."""
    return (
        assignment.site == site and assignment.work is Work.TRAIN and assignment.state is AssignmentState.DONE
    )


def _objection(result: Result, entry: _Open, data_bytes: int) -> str | None:
    """What is wrong with a result; None if nothing is. ``data_bytes`` is the size of the site's data set."""
    assignment, spec = entry.assignment, entry.run.spec
    if not 0 < result.examples <= LARGEST_COUNT:
        return f"it claims {result.examples} examples, wanted a positive number"
    most_tokens = result.examples * spec.task.context_tokens
    if not 0 <= result.tokens <= most_tokens:
        return f"it claims {result.tokens} tokens, {result.examples} examples have at most {most_tokens}"
    wrong = [name for name, value in result.metrics.items() if not math.isfinite(value)]
    if wrong:
        return f"its metric {wrong[0]} is {result.metrics[wrong[0]]}, wanted a finite number"
    if assignment.work is Work.EVALUATE:
        most = min(spec.evaluation.max_examples or data_bytes, data_bytes)
        return None if result.examples <= most else f"it claims {result.examples} examples of at most {most}"
    if not is_digest(result.update_digest):
        return f"its update's digest is {result.update_digest[:100]!r}, wanted {DIGEST}"
    if spec.local.steps is not None and result.examples > spec.local.steps * spec.local.batch_examples:
        most = spec.local.steps * spec.local.batch_examples
        return f"it claims {result.examples} examples, {spec.local.steps} steps use at most {most}"
    most_examples = spec.aggregation.max_examples
    if most_examples is not None and result.examples > most_examples:
        return f"it claims {result.examples} examples, aggregation.max_examples is {most_examples}"
    if not 8 < result.update_bytes <= entry.terms.most_update_bytes:
        return (
            f"its update has {result.update_bytes} bytes, the model has {assignment.model_bytes} and "
            f"transport.up makes at most {entry.terms.most_update_bytes} of it"
        )
    return None


def _facts(assignment: Assignment) -> dict[str, object]:
    return {
        "run": assignment.run_id,
        "round": assignment.round,
        "site": assignment.site,
        "work": str(assignment.work),
    }


def _now_s() -> float:
    return asyncio.get_running_loop().time()
