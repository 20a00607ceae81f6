"""A run spec's aggregation: how updates become the next global model."""

from pydantic import Field

from fedloom_common.runspec.algorithms import Scaffold
from fedloom_common.runspec.cohort import Cohort
from fedloom_common.runspec.local import Local
from fedloom_common.runspec.mode import Async, Sync
from fedloom_common.runspec.rules import MeanRule, Rule
from fedloom_common.runspec.serveroptimizers import FedAvg, ServerOptimizer
from fedloom_common.strict import Strict


class Clip(Strict):
    """A bound on how far an update may move its model, by how far others did in earlier rounds."""

    factor: float = Field(default=1.0, gt=0)
    """Longest change that counts whole, in medians of the updates' norms; a longer one is scaled to it."""
    rounds: int = Field(default=10, ge=1)
    """Rounds before the present one that the median is over; the first takes that of its own updates."""


class Aggregation(Strict):
    """How updates become the next global model."""

    rule: Rule = MeanRule()
    """What the updates come to: a name, such as ``weighted_mean`` or ``median``, or a mapping with it and
    its parameters, such as ``{name: krum, byzantine: 1}``."""
    clip: Clip | None = None
    """Whether updates that move the model much farther than others did are scaled down, before the rule."""
    server_optimizer: ServerOptimizer = FedAvg()
    """What the coordinator makes of that, such as ``fedavg``, which takes it as it is, or ``diloco``."""
    max_examples: int | None = Field(default=None, ge=1)
    """Largest nₖ that an update may claim; one that claims more is rejected. nₖ counts the examples of a
    ``causal_lm`` or ``classification`` task, and of others the tokens that the loss is taken on."""
    deterministic: bool = False
    """Whether updates are folded in cohort order: the same updates give the same bytes in whatever order
    they arrive, but those of fast sites may wait on disk for a slow one's."""

    def require_fit(self, mode: Sync | Async, cohort: Cohort, local: Local) -> None:
        """Check that a robust rule can keep what it promises, and that the step has one rate.

        Raises:
            ValueError: tells what contradicts the rule or the optimizer, and what to do.
        """
        if self.rule.is_robust:
            self._require_fit_of_rule(mode, cohort, local)
        if isinstance(mode, Async) and mode.server_lr != 1 and self.server_optimizer != FedAvg():
            raise ValueError(
                f"mode.server_lr is {mode.server_lr:g} and aggregation.server_optimizer "
                f"{self.server_optimizer.name} has a learning rate of its own: drop mode.server_lr"
            )

    def _require_fit_of_rule(self, mode: Sync | Async, cohort: Cohort, local: Local) -> None:
        rule, needed = f"aggregation.rule {self.rule.name}", self.rule.needed_updates()
        if isinstance(mode, Async):
            raise ValueError(
                f"{rule} and mode.kind: async contradict each other: a fast site may fill a buffer by "
                "itself, so that no number of bad updates can be assumed; take rounds, or weighted_mean"
            )
        if cohort.late == "carry":
            raise ValueError(
                f"{rule} and cohort.late: carry contradict each other: a site may then have two updates in a "
                "round, and count as two; drop one of them"
            )
        if isinstance(local.algorithm, Scaffold):
            raise ValueError(
                f"{rule} and local.algorithm scaffold contradict each other: its control variates are means "
                "over all sites; take another algorithm, or weighted_mean"
            )
        if cohort.needed < needed:
            raise ValueError(
                f"{rule} needs {needed} updates as it is set, and a round counts with {cohort.needed}: raise "
                "cohort.quorum or cohort.min_sites"
            )
