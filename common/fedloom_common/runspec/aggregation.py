"""A run spec's aggregation: how updates become the next global model."""

from typing import Literal

from pydantic import Field

from fedloom_common.strict import Strict


class Aggregation(Strict):
    """How updates become the next global model."""

    rule: Literal["weighted_mean"] = "weighted_mean"
    """The weighted mean  Σ nₖ/n θₖ  (FedAvg)."""
    max_examples: int | None = Field(default=None, ge=1)
    """Largest nₖ that an update may claim; an update that claims more is rejected."""
    deterministic: bool = False
    """Whether updates are folded in cohort order: the same updates give the same bytes in whatever order
    they arrive, but those of fast sites may wait on disk for a slow one's."""
