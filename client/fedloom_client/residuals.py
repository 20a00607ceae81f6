"""What updates leave at the site, kept for the run's next one: what lossy codecs left out, control variates.

Of each run there is one residual, and one set of SCAFFOLD's control variates, beside the optimizer's
state. Encoding an update prepares the residual that it leaves, training prepares the control variates;
both are forgotten with an update that is given up, and count if the update does: that is told with the
run's next training.
"""

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from fedloom_client.messages import Assignment
from fedloom_client.statedir import StateDir
from fedloom_common.errors import BadTensor, FederationError
from fedloom_common.leavings import Leavings

if TYPE_CHECKING:
    from fedloom_common.codecs.feedback import Feedback

logger = logging.getLogger(__name__)


class Residuals:
    """The residuals by run and assignment."""

    def __init__(self, state: StateDir) -> None:
        self._state = state

    def feedback(self, run_id: str, assignment_id: str, round_: int) -> "Feedback":
        """The run's residual, for the update of an assignment of a round."""
        from fedloom_common.codecs.feedback import Feedback  # needs numpy, which not every daemon does

        return Feedback(self._state.residual_folder(run_id), assignment_id, round_)

    def deliver(self, run_id: str, assignment_id: str) -> None:
        """Keep what a delivered update left until it is told whether it counts; again, it changes nothing."""
        for leavings in self._of(run_id):
            try:
                leavings.deliver(assignment_id)
            except (FederationError, OSError) as error:  # the update counts all the same
                facts = {"run": run_id, "assignment": assignment_id, "error": str(error)}
                logger.warning("what an update left at the site is lost", extra=facts)

    def settle(self, assignment: Assignment) -> None:
        """Let what the run's last update left count, or forget it, before a training uses it."""
        facts = {"run": assignment.run_id, "assignment": assignment.id}
        for leavings in self._of(assignment.run_id):
            try:
                if not leavings.settle(assignment.round, assignment.counted_round):
                    logger.info("what an update left is forgotten: it did not count", extra=facts)
            except BadTensor as error:
                facts["error"] = str(error)
                logger.warning("what an update left at the site is lost", extra=facts)

    def discard(self, run_id: str, assignment_id: str) -> None:
        """Forget what an update left that was given up; after its delivery there is nothing to forget."""
        for leavings in self._of(run_id):
            with suppress(BadTensor, OSError):  # a damaged file is replaced by the next update's
                leavings.discard(assignment_id)

    def _of(self, run_id: str) -> list[Leavings]:
        """Those that the run has: not every codec and algorithm leaves anything, and it goes with the run."""
        folders = (self._state.residual_folder(run_id), self._state.control_folder(run_id))
        return [Leavings(folder) for folder in folders if folder.exists()]
