"""Assignments that have not ended: the terms that hold for them, and their signs of life."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedloom_server.adapters.parts import PartFile
from fedloom_server.downlink import Delta
from fedloom_server.records import Assignment, AssignmentState, Run, RunState, Work
from fedloom_server.store import Store
from fedloom_server.watching import SiteProgress

WORKING_PHASES = frozenset({"start", "prepare", "train", "evaluate", "encode"})
"""Phases whose progress the site alone can tell; transfers are alive by the bytes that we see."""

QUEUED_PHASE = "queued"
"""The site does other work first: the assignment is as alive as that."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What holds for every assignment of a batch: how long it is waited for, and what may pass."""

    needed: int
    """Sites without whose results the rest is not worth waiting for."""
    target: int = 0
    """Sites with whose results the batch is done, whoever is still at work; 0 for all."""
    deadline_s: float | None
    """Seconds after which what is open is lost, or late."""
    elapsed_s: float = 0.0
    """How many of them had passed when the coordinator was started again."""
    stall_s: float
    """Seconds without progress after which an assignment is lost."""
    carries_late: bool = False
    """Whether a site that is not done in time goes on, for its result to be taken by a later batch."""
    comes_first: bool = False
    """Whether what lies on disk waits for the batch's updates: they may arrive beyond ``staged_updates``, and
    do not count among these."""
    most_update_bytes: int = 0
    """Size of the largest file that an update of the batch's model can be."""
    delta: Delta | None = None
    """A smaller way to the batch's model."""
    folds: tuple[PartFile, ...] = ()
    """What is folded into the frozen weights under the batch's model, if that is an adapter."""
    counted: Mapping[str, int] | None = None
    """By site, the last round of its own whose update counts; None where updates leave nothing at sites."""


def _nothing() -> None:
    """Nobody wants to hear."""


@dataclass(kw_only=True, eq=False)
class Pending:
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

    @property
    def is_queued(self) -> bool:
        """Whether the site has said that it does other work first."""
        return self.last is not None and self.last.phase == QUEUED_PHASE

    @property
    def counted_round(self) -> int | None:
        """The site's last round before this whose update counts, 0 if none does; None as in the terms."""
        assignment = self.assignment
        if self.terms.counted is None or assignment.work is not Work.TRAIN:
            return None
        return min(self.terms.counted.get(assignment.site, 0), assignment.site_round - 1)

    def leave_behind(self) -> None:
        """The round goes on without it; a later one may take it up."""
        self.batch, self.on_end = (), _nothing

    def told(self, progress: SiteProgress, now_s: float) -> None:
        """The site says how far it has come; only what has moved is a sign of life."""
        moved = self.last is None or (progress.phase, progress.done) != (self.last.phase, self.last.done)
        if moved and progress.phase in WORKING_PHASES:
            self.alive_at_s = now_s
        self.last = progress

    def why_lost(self, reason: str, *, is_connected: bool) -> str:
        """A reason, with what was last seen of the site's work."""
        if self.last is not None:
            reason += f"; last seen in {self.last.phase}, {self.last.done} of {self.last.total or '?'} done"
        if not is_connected:
            reason += "; the site is not connected"
        if self.trouble:
            reason += f"; last error: {self.trouble}"
        return reason


class OpenAssignments(dict[str, Pending]):
    """What has not ended and is waited for, by id."""

    def of(self, site: str) -> list[Pending]:
        """What one site has been given, first to last."""
        return [entry for entry in self.values() if entry.assignment.site == site]


def sites_done(batch: Sequence[Assignment]) -> int:
    """Sites whose result has come; a late result and a fresh one of the same site count as one site."""
    return len({assignment.site for assignment in batch if assignment.state is AssignmentState.DONE})


def sites_possible(batch: Sequence[Assignment]) -> int:
    """Sites whose result has come or may yet come."""
    hopeful = (AssignmentState.DONE, AssignmentState.OPEN)
    return len({assignment.site for assignment in batch if assignment.state in hopeful})


def may_be_taken_up(stored: Assignment, site: str, store: Store) -> bool:
    """Whether a run that has yet to go on will want an assignment of a site."""
    if stored.site != site or stored.state is not AssignmentState.OPEN:
        return False
    state = store.run(stored.run_id).state
    return state.goes_on_by_itself or (state is RunState.PAUSED and bool(stored.update_digest))


def facts_of(assignment: Assignment) -> dict[str, object]:
    """What tells an assignment from others in a line of the log."""
    return {
        "run": assignment.run_id,
        "round": assignment.round,
        "site": assignment.site,
        "work": str(assignment.work),
    }
