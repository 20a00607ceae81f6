"""What sites say of the work that they were given: the session's edge reports it here."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

from fedloom_common.partial import discard
from fedloom_server.adapters.parts import parts_of
from fedloom_server.clock import now_s
from fedloom_server.federation import Federation
from fedloom_server.pending import Pending, may_be_taken_up
from fedloom_server.records import Assignment, AssignmentState, RunState, Work
from fedloom_server.results import Result, objection
from fedloom_server.watching import SiteProgress

MOST_ANNOUNCEMENTS = 5  # a site that lost its update trains again; without end they must not hold a round


class Reports:
    """Sites' reports, each held against what the site was asked for."""

    def __init__(self, federation: Federation) -> None:
        self._store, self._sites, self._watching = federation.store, federation.sites, federation.watching
        self._assignments = federation.assignments
        self._open, self._turns = self._assignments.open, self._assignments.uploads.turns

    def attached(self, site: str, open_ids: Iterable[str] = (), kept_runs: Sequence[str] = ()) -> None:
        """Send a site its open assignments again: it may have missed them, or that others have ended."""
        self._tell_ended_runs(site, kept_runs)
        for assignment_id in open_ids:
            self._entry(site, assignment_id)
        for entry in self._open.of(site):
            self._assignments.send(entry)
        for assignment_id in open_ids:
            self._hold(site, assignment_id)

    def detached(self, site: str) -> None:
        """Let other sites upload in place of one that has gone."""
        for entry in self._open.of(site):
            self._turns.leave(entry.assignment.id)

    def progress(self, site: str, progress: SiteProgress) -> None:
        """A site says how far it has come; only what has moved is a sign of life."""
        entry = self._open.get(progress.assignment_id)
        if entry is None or entry.assignment.site != site:
            return  # it crossed with our word that the assignment has ended
        told = replace(progress, round=entry.assignment.round, work=entry.assignment.work)
        entry.told(told, now_s())
        self._watching.tell(entry.run.id, told)

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
            self._assignments.end(entry, AssignmentState.REJECTED, wrong)
            return
        if assignment.update_digest and assignment.update_digest == result.update_digest:
            self._turns.ask(assignment.id)  # it asks again after a reconnect
            return
        entry.announcements += 1
        if entry.announcements > MOST_ANNOUNCEMENTS:
            wrong = f"it has announced {entry.announcements} different updates"
            self._assignments.end(entry, AssignmentState.REJECTED, wrong)
            return
        if assignment.update_digest:
            discard(self._store.spool.update_path(assignment))  # trained again, with other bytes
        assignment.examples, assignment.tokens = result.examples, result.tokens
        assignment.metrics, assignment.phase_seconds = dict(result.metrics), dict(result.phase_seconds)
        assignment.metric_weights = dict(result.weights)
        assignment.metric_counts = {name: list(counts) for name, counts in result.counts.items()}
        assignment.data_examples = result.data_examples
        if result.before is not None and assignment.measures:
            assignment.base_measured = asdict(result.before)
        if assignment.work is not Work.TRAIN:
            self._assignments.end(entry, AssignmentState.DONE)
            return
        assignment.update_digest, assignment.update_bytes = result.update_digest, result.update_bytes
        entry.alive_at_s = now_s()
        self._store.save(assignment)
        self._turns.ask(assignment.id)

    def refused(self, site: str, assignment_id: str, reason: str) -> None:
        """A site does not permit an assignment."""
        if entry := self._entry(site, assignment_id):
            self._assignments.end(entry, AssignmentState.REFUSED, reason)

    def failed(self, site: str, assignment_id: str, reason: str) -> None:
        """A site could not finish an assignment."""
        if entry := self._entry(site, assignment_id):
            self._assignments.end(entry, AssignmentState.FAILED, reason)

    def _tell_ended_runs(self, site: str, kept_runs: Sequence[str]) -> None:
        """Let a site clear away what it keeps of runs that ended, or went from our records, without it."""
        link = self._sites.link(site)
        states = {run.id: run.state for run in self._store.runs()} if link and kept_runs else {}
        for run_id in kept_runs:
            state = states.get(run_id)
            if link and (state is None or state.is_end):
                link.run_ended(run_id, may_resume=state in (RunState.FAILED, RunState.STOPPED))

    def _entry(self, site: str, assignment_id: str) -> Pending | None:
        """The open assignment that a site speaks of; tells the site what became of any other."""
        entry = self._open.get(assignment_id)
        if entry is not None and entry.assignment.site == site:
            return entry
        stored, link = self._store.assignment(assignment_id), self._sites.link(site)
        if link is None or (stored is not None and may_be_taken_up(stored, site, self._store)):
            return None
        if stored is not None and stored.site == site and _counts(stored):
            link.cancel(assignment_id, "its update is here and counts", counts=True)
        else:
            link.cancel(assignment_id, "it is not, or no longer, wanted from this site")
        return None

    def _hold(self, site: str, assignment_id: str) -> None:
        """Ask a site for a finished training of a paused run, so that it keeps it."""
        stored, link = self._store.assignment(assignment_id), self._sites.link(site)
        if stored is None or link is None or not may_be_taken_up(stored, site, self._store):
            return
        run = self._store.run(stored.run_id)
        if run.state is RunState.PAUSED:
            link.assign(stored, run, None, parts_of(self._store, run, stored.model_digest).folds)

    def _data_bytes(self, entry: Pending) -> int:
        return self._sites.data_bytes(entry.assignment.site, entry.run.spec.data)


def _counts(assignment: Assignment) -> bool:
    """Whether an update has come and counts."""
    return assignment.work is Work.TRAIN and assignment.state is AssignmentState.DONE
