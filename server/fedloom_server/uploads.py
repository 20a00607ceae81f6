"""Updates on their way into the spool: whose turn it is, what is still wanted, and what came of it."""

import logging
from collections.abc import Iterable

from fedloom_common.errors import NotPermitted, Unreachable, WrongState
from fedloom_common.partial import held_bytes
from fedloom_server.clock import now_s
from fedloom_server.meters import Meters
from fedloom_server.patience import End
from fedloom_server.pending import OpenAssignments, facts_of, may_be_taken_up
from fedloom_server.records import Assignment, AssignmentState
from fedloom_server.sites import Sites
from fedloom_server.store import Store
from fedloom_server.turns import UploadTurns

logger = logging.getLogger(__name__)


class Uploads:
    """The uploads of open assignments; each has the name of its assignment."""

    def __init__(
        self,
        store: Store,
        sites: Sites,
        meters: Meters,
        open_assignments: OpenAssignments,
        *,
        end: End,
        concurrent_uploads: int,
        staged_updates: int,
    ) -> None:
        """``end`` ends an assignment whose update has come, or is not valid."""
        self._store, self._sites, self._meters = store, sites, meters
        self._open, self._end = open_assignments, end
        self.staged_updates = staged_updates
        self.turns = UploadTurns(
            concurrent_uploads=concurrent_uploads,
            staged_updates=staged_updates,
            on_turn=self._grant,
            is_next=self._is_next,
            on_stuck=self._look_all,
        )

    def stage(self, batch: Iterable[Assignment]) -> None:
        """Count the updates that lie on disk."""
        for assignment in batch:
            if assignment.has_spooled_update:
                self.turns.stage(assignment.id)

    def release(self, batch: Iterable[Assignment]) -> None:
        """Updates lie no longer on disk, or need no longer be waited for: others may arrive."""
        for assignment in batch:
            self.turns.release(assignment.id)

    @property
    def is_short_of_room(self) -> bool:
        """Whether sites wait for room that only folding can make, if it is of few updates."""
        return self.turns.is_stuck

    def uploading(self, site: str, upload: str) -> Assignment:
        """The assignment whose update a site may send now, or has sent.

        Raises:
            NotPermitted: it is no upload of this site; whether it is another's, nobody is told.
            WrongState: it is not, or no longer, wanted.
            Unreachable: it will be, when its run goes on.
        """
        entry = self._open.get(upload)
        assignment = entry.assignment if entry else self._store.assignment(upload)
        if assignment is None or assignment.site != site:
            raise NotPermitted(f"this site has no upload {upload[:200]!r}")
        if assignment.state is AssignmentState.DONE:
            return assignment
        if entry is None and may_be_taken_up(assignment, site, self._store):
            raise Unreachable(f"the run of upload {upload} has yet to go on; try again")
        if entry is None or not assignment.update_digest:
            raise WrongState(
                f"upload {upload} is not wanted now: {assignment.reason or 'send its outcome first'}"
            )
        return assignment

    def received(self, assignment: Assignment, up_bytes: int) -> None:
        """Bytes of an update have come."""
        self._meters.received(assignment.site, up_bytes)
        assignment.bytes_up += up_bytes
        if up_bytes and (entry := self._open.get(assignment.id)):
            entry.alive_at_s = now_s()

    def held_bytes(self, assignment: Assignment) -> int:
        """Bytes of an update that are on disk; none of a larger file, whose mark a power cut has taken."""
        held = held_bytes(self._store.spool.update_path(assignment))
        return held if held <= assignment.update_bytes else 0

    def troubled(self, assignment: Assignment, reason: str) -> None:
        """A transfer broke and may be tried again; the reason is told if the assignment stalls."""
        if entry := self._open.get(assignment.id):
            entry.trouble = reason
        logger.warning("upload interrupted", extra=facts_of(assignment) | {"reason": reason})

    def rejected(self, assignment: Assignment, reason: str) -> None:
        """An update is not valid and will not count."""
        if entry := self._open.get(assignment.id):
            self._end(entry, AssignmentState.REJECTED, reason)

    def delivered(self, assignment: Assignment, digest: str) -> None:
        """An update, by its digest, is whole, valid and on disk: it counts from now on.

        Raises:
            WrongState: the round went on, or the site announced another update, while this one was checked.
            Unreachable: the run has yet to go on.
        """
        current = self.uploading(assignment.site, assignment.id)
        if current.update_digest != digest:
            raise WrongState(f"upload {assignment.id} is {digest}, but the site has since announced another")
        if current.state is not AssignmentState.DONE:
            self._end(self._open[assignment.id], AssignmentState.DONE, "")

    def _grant(self, assignment_id: str) -> bool:
        entry = self._open.get(assignment_id)
        link = self._sites.link(entry.assignment.site) if entry else None
        if entry is None or link is None:
            return False  # it asks again when it is back
        entry.alive_at_s = now_s()
        link.grant(assignment_id, self.held_bytes(entry.assignment))
        return True

    def _is_next(self, assignment_id: str) -> bool:
        """Whether others on disk wait for an update, as for the first of a cohort that is still open."""
        entry = self._open.get(assignment_id)
        if entry is not None and entry.terms.comes_first:
            return True
        if entry is None or not entry.run.spec.aggregation.deterministic:
            return False
        still = (other for other in entry.batch if other.state is AssignmentState.OPEN)
        return next(still, None) is entry.assignment

    def _look_all(self) -> None:
        """Every run's folding is to look again: several may have a few updates each, and none enough."""
        for entry in list(self._open.values()):
            if entry.assignment.state is AssignmentState.OPEN:  # one that ends just now is told by itself
                entry.on_end()
