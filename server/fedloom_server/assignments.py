"""Assignments from the moment they are given until each has ended, by result, refusal or silence.

Rounds say what is to be done and wait here; the gRPC edge reports here what
sites answer. One notion of life: an assignment that makes progress is alive,
one that makes none for ``stall_s`` is lost.
"""

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedloom_common.errors import NotFound, NotPermitted, WrongState
from fedloom_common.tensors import HEADER_LIMIT_BYTES
from fedloom_server.records import Assignment, AssignmentState, Run, RunState, Work
from fedloom_server.sites import Sites
from fedloom_server.store import Store
from fedloom_server.watching import SiteProgress, Watching

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How long a batch of assignments is waited for."""

    needed: int
    """Results without which the rest is not worth waiting for."""
    deadline_s: float | None
    """Seconds after which what is open is lost."""
    stall_s: float
    """Seconds without progress after which an assignment is lost."""


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
    last: SiteProgress | None = None
    trouble: str = ""
    """The latest error of a transfer that may yet be retried."""
    begun_at_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun_at_s = self.alive_at_s


class Assignments:
    """The open assignments of every run, by id."""

    def __init__(self, store: Store, sites: Sites, watching: Watching, *, concurrent_uploads: int) -> None:
        self._store = store
        self._sites = sites
        self._watching = watching
        self._concurrent_uploads = concurrent_uploads
        self._open: dict[str, _Open] = {}
        self._waiting: list[str] = []  # finished trainings whose upload's turn has not come
        self._uploading: set[str] = set()

    async def carry_out(self, run: Run, batch: Sequence[Assignment], terms: Terms) -> None:
        """Give assignments to their sites and wait until every one has ended.

        Those of the batch that have ended before stay as they are. If this is
        cancelled the open ones stay open in the store, to be taken up again.
        """
        opened = [
            self._begin(run, assignment, terms)
            for assignment in batch
            if assignment.state is AssignmentState.OPEN
        ]
        try:
            await self._until_ended(batch, opened, terms)
        finally:
            for entry in opened:
                self._forget(entry)

    def attached(self, site: str) -> None:
        """Send a site its open assignments again: it may have missed them."""
        for entry in self._of(site):
            self._send(entry)

    def detached(self, site: str) -> None:
        """Let other sites upload in place of one that has gone."""
        for entry in self._of(site):
            self._leave_queue(entry.assignment.id)
        self._grant_next()

    def progress(self, site: str, progress: SiteProgress) -> None:
        """A site says how far it has come; only what has moved is a sign of life."""
        entry = self._open.get(progress.assignment_id)
        if entry is None or entry.assignment.site != site:
            return  # it crossed with our word that the assignment has ended
        if progress != entry.last:
            entry.alive_at_s = _now_s()
        entry.last = replace(progress, round=entry.assignment.round, work=entry.assignment.work)
        self._watching.tell(entry.run.id, entry.last)

    def moved(self, site: str, *, down_bytes: int) -> None:
        """Bytes of a model went to a site: a sign of life of whatever it was asked to do."""
        for entry in self._of(site):
            entry.alive_at_s = _now_s()
        for entry in self._of(site)[:1]:
            entry.assignment.bytes_down += down_bytes

    def received(self, assignment: Assignment, up_bytes: int) -> None:
        """Bytes of an update have come."""
        assignment.bytes_up += up_bytes
        if entry := self._open.get(assignment.id):
            entry.alive_at_s = _now_s()

    def finished(self, site: str, assignment_id: str, result: Result) -> None:
        """A site has finished: an evaluation ends here, a training waits for its upload."""
        entry = self._entry(site, assignment_id)
        if entry is None:
            return
        assignment = entry.assignment
        if (wrong := _objection(result, assignment, entry.run)) is not None:
            self._reject(entry, wrong)
            return
        if assignment.update_digest not in ("", result.update_digest):
            self._store.update_path(assignment).unlink(missing_ok=True)  # trained again, with other bytes
        assignment.examples, assignment.tokens = result.examples, result.tokens
        assignment.metrics, assignment.phase_seconds = dict(result.metrics), dict(result.phase_seconds)
        assignment.update_digest, assignment.update_bytes = result.update_digest, result.update_bytes
        if assignment.work is Work.EVALUATE:
            self._end(entry, AssignmentState.DONE)
            return
        entry.alive_at_s = _now_s()
        self._store.save(assignment)
        self._leave_queue(assignment.id)
        self._waiting.append(assignment.id)
        self._grant_next()

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
            NotFound, NotPermitted: it is no upload, or another site's.
            WrongState: it is not, or no longer, wanted.
        """
        entry = self._open.get(upload)
        assignment = entry.assignment if entry else self._store.assignment(upload)
        if assignment is None:
            raise NotFound(f"there is no upload {upload[:200]!r}")
        if assignment.site != site:
            raise NotPermitted(f"upload {upload} belongs to another site")
        if assignment.state is not AssignmentState.DONE and (entry is None or not assignment.update_digest):
            raise WrongState(
                f"upload {upload} is not wanted now: {assignment.reason or 'send its outcome first'}"
            )
        return assignment

    def delivered(self, assignment: Assignment) -> None:
        """An update is whole, valid and on disk: it counts from now on.

        Raises:
            WrongState: the round went on while the update was being checked.
        """
        entry = self._open.get(assignment.id)
        if entry is None:
            raise WrongState(f"upload {assignment.id} came too late: its round has gone on")
        self._end(entry, AssignmentState.DONE)

    def rejected(self, assignment: Assignment, reason: str) -> None:
        """An update is not valid and will not count."""
        if entry := self._open.get(assignment.id):
            self._reject(entry, reason)

    def troubled(self, assignment: Assignment, reason: str) -> None:
        """A transfer broke and may be tried again; the reason is told if the assignment stalls."""
        if entry := self._open.get(assignment.id):
            entry.trouble = reason
        logger.warning("upload interrupted", extra=_facts(assignment) | {"reason": reason})

    def _begin(self, run: Run, assignment: Assignment, terms: Terms) -> _Open:
        ended = asyncio.get_running_loop().create_future()
        entry = _Open(assignment=assignment, run=run, terms=terms, alive_at_s=_now_s(), ended=ended)
        self._open[assignment.id] = entry
        self._send(entry)
        return entry

    def _send(self, entry: _Open) -> None:
        if link := self._sites.link(entry.assignment.site):
            link.assign(entry.assignment, entry.run)

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
            if entry.assignment.id in self._waiting and self._sites.link(entry.assignment.site):
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
        self._store.update_path(entry.assignment).unlink(missing_ok=True)
        self._end(entry, AssignmentState.REJECTED, reason)

    def _end(self, entry: _Open, state: AssignmentState, reason: str = "") -> None:
        """The one place where an assignment ends: in the store first, then for those who wait."""
        assignment = entry.assignment
        assignment.state, assignment.reason = state, reason
        self._store.save(assignment)
        self._forget(entry)
        if not entry.ended.done():
            entry.ended.set_result(None)
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
        self._leave_queue(entry.assignment.id)
        self._grant_next()

    def _leave_queue(self, assignment_id: str) -> None:
        self._uploading.discard(assignment_id)
        if assignment_id in self._waiting:
            self._waiting.remove(assignment_id)

    def _grant_next(self) -> None:
        while self._waiting and len(self._uploading) < self._concurrent_uploads:
            entry = self._open[self._waiting.pop(0)]
            if link := self._sites.link(entry.assignment.site):
                self._uploading.add(entry.assignment.id)
                entry.alive_at_s = _now_s()
                link.grant(entry.assignment.id, self.held_bytes(entry.assignment))

    def held_bytes(self, assignment: Assignment) -> int:
        """Bytes of an update that are on disk."""
        path = self._store.update_path(assignment)
        return path.stat().st_size if path.exists() else 0

    def _of(self, site: str) -> list[_Open]:
        return [entry for entry in self._open.values() if entry.assignment.site == site]

    def _entry(self, site: str, assignment_id: str) -> _Open | None:
        """The open assignment that a site speaks of; tells the site when there is none any more."""
        entry = self._open.get(assignment_id)
        if entry is not None and entry.assignment.site == site:
            return entry
        if not self._may_be_taken_up(site, assignment_id) and (link := self._sites.link(site)):
            link.cancel(assignment_id, "it is not, or no longer, wanted from this site")
        return None

    def _may_be_taken_up(self, site: str, assignment_id: str) -> bool:
        """Whether a run that has yet to go on after a restart will want the assignment."""
        stored = self._store.assignment(assignment_id)
        if stored is None or stored.site != site or stored.state is not AssignmentState.OPEN:
            return False
        return self._store.run(stored.run_id).state in (RunState.RUNNING, RunState.QUEUED)


def _objection(result: Result, assignment: Assignment, run: Run) -> str | None:
    """What is wrong with a result's numbers; None if nothing is."""
    spec = run.spec
    if result.examples <= 0:
        return f"it claims {result.examples} examples, wanted a positive number"
    wrong = [name for name, value in result.metrics.items() if not math.isfinite(value)]
    if wrong:
        return f"its metric {wrong[0]} is {result.metrics[wrong[0]]}, wanted a finite number"
    if assignment.work is Work.EVALUATE:
        return None
    if spec.local.steps is not None and result.examples > spec.local.steps * spec.local.batch_examples:
        most = spec.local.steps * spec.local.batch_examples
        return f"it claims {result.examples} examples, {spec.local.steps} steps use at most {most}"
    most_examples = spec.aggregation.max_examples
    if most_examples is not None and result.examples > most_examples:
        return f"it claims {result.examples} examples, aggregation.max_examples is {most_examples}"
    if not 8 < result.update_bytes <= assignment.model_bytes + HEADER_LIMIT_BYTES:
        return f"its update has {result.update_bytes} bytes, the model has {assignment.model_bytes}"
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
