"""What updates leave at the site, kept for the run's next one: what lossy codecs left out, control variates.

Of each run there is one residual, and one set of SCAFFOLD's control variates, beside the optimizer's
state. Encoding an update prepares the residual that it leaves, training prepares the control variates;
both count once the coordinator has said that the update does, and are forgotten with an update that is
given up.
"""

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from fedloom_client.statedir import StateDir
from fedloom_client.training.controls import SiteControls
from fedloom_common.errors import BadTensor, FederationError

if TYPE_CHECKING:
    from fedloom_common.codecs.feedback import Feedback

logger = logging.getLogger(__name__)


class Residuals:
    """The residuals by run and assignment."""

    def __init__(self, state: StateDir) -> None:
        self._state = state

    def feedback(self, run_id: str, assignment_id: str) -> "Feedback":
        """The run's residual, for an assignment's update."""
        from fedloom_common.codecs.feedback import Feedback  # needs numpy, which not every daemon does

        return Feedback(self._state.residual_folder(run_id), assignment_id)

    def commit(self, run_id: str, assignment_id: str) -> None:
        """Let count what a delivered update left. Doing it again changes nothing."""
        try:
            SiteControls(self._state.run_folder(run_id)).commit(assignment_id)
            if self._is_kept(run_id):
                self.feedback(run_id, assignment_id).commit()
        except (FederationError, OSError) as error:  # the update counts all the same
            facts = {"run": run_id, "assignment": assignment_id, "error": str(error)}
            logger.warning("what an update left at the site is lost", extra=facts)

    def discard(self, run_id: str, assignment_id: str) -> None:
        """Forget what an update left that was given up; after its commit there is nothing to forget."""
        with suppress(BadTensor, OSError):  # a damaged file is replaced by the next update's
            SiteControls(self._state.run_folder(run_id)).discard(assignment_id)
        if self._is_kept(run_id):
            with suppress(BadTensor, OSError):
                self.feedback(run_id, assignment_id).discard()

    def _is_kept(self, run_id: str) -> bool:
        """Whether the run has a residual: not every codec leaves one, and it goes with the run's end."""
        return self._state.residual_folder(run_id).exists()
