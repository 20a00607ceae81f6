"""A run spec's transport: how models and updates are made smaller for the wire."""

from fedloom_common.codecs.spec import AS_IS, Codecs, uses_feedback
from fedloom_common.strict import Strict


class Transport(Strict):
    """How models and updates are made smaller for the wire: a chain of codecs for each direction.

    A chain is a stage or a list of them, such as ``up: int8`` and ``down: [bf16, zstd]``.
    """

    up: Codecs = AS_IS
    """Updates, on their way from the sites; all but ``fp32`` tell the change against the round's model."""
    down: Codecs = AS_IS
    """New global models, on their way to the sites; all but ``fp32`` tell the change against the model
    before, to sites that hold it. What a lossy chain tells is the new model, for all; what it leaves out
    the coordinator always adds to the next round's change, whatever ``error_feedback`` says."""

    @property
    def feeds_back(self) -> bool:
        """Whether a site adds what its updates left out to later ones."""
        return any(uses_feedback(stage) for stage in self.up)
