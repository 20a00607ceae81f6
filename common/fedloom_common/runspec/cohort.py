"""A run spec's cohort: which sites take part in a round, how long it waits for them, what late ones count."""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from fedloom_common.requirements import Require
from fedloom_common.strict import Name, Strict


class Staleness(Strict):
    """What an update counts that began τ versions of the model ago, or whose round went on τ rounds ago."""

    exponent: float = Field(default=0.5, ge=0, le=10)
    """a of the factor (1 + τ)^−a on the update's change; 0 counts old and new alike."""
    max: int = Field(default=20, ge=0)
    """Largest τ: a training that falls further behind is given up, and its site begins anew."""


class Cohort(Strict):
    """Which sites take part in a round, and how many must."""

    require: Require = Require()
    """What a site must have to take part, such as ``{gpu_memory_gb: 40, label: icu}``."""
    policy: Name = "uniform"
    """How a round picks from the sites that fit: ``uniform`` (each as likely as the other), ``weighted`` (by
    examples), ``round_robin`` (who waits longest), ``all``, or a plug-in's name."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the sites that fit that a round picks."""
    min_sites: int = Field(default=1, ge=1)
    """A round begins when so many sites that fit are connected, and picks no fewer."""
    quorum: int | None = Field(default=None, ge=1)
    """Updates needed for a round to count; ``min_sites`` if not given."""
    over_select: float = Field(default=0.0, ge=0, le=10)
    """Extra sites to ask, as a share; the round goes on once it has as many updates as it would have asked
    for without them. 0.25 asks 10 sites for 8 updates; needs a ``fraction`` below 1."""
    late: Literal["refuse", "carry"] = "refuse"
    """What becomes of sites that are still at work when a round goes on: their work is called off, or
    they finish it and a later round takes their updates, as changes of the model that they began with."""
    staleness: Staleness = Staleness(max=4)
    """What late updates count, with ``late: carry``."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Seconds after which a round goes on with the updates that have come; none if not given."""
    stall_s: float = Field(default=300, gt=0)
    """Seconds without any progress after which a site's assignment is given up."""
    attempts: int = Field(default=3, ge=1)
    """Times that a round with too few updates is tried at once; then the run waits for its sites."""

    @property
    def needed(self) -> int:
        """Updates needed for a round to count."""
        return self.quorum or self.min_sites

    def without_effect(self) -> Iterator[str]:
        """Settings that change nothing beside the others, and what to do.

        Not looked at where a run is read that has begun.
        """
        if self.over_select and self.fraction == 1:
            is_all = self.policy == "all"
            came, change = (
                ("policy is all", "take another policy and") if is_all else ("fraction is 1", "set")
            )
            yield (
                f"cohort.over_select is {self.over_select:g}, but {came}: every site that fits is asked "
                f"already; {change} a fraction below 1, such as 0.8, or drop over_select"
            )

    @model_validator(mode="after")
    def _all_is_all(self) -> Self:
        if self.policy == "all" and self.fraction != 1:
            raise ValueError(
                f"policy all picks every site, and fraction is {self.fraction:g}: drop one of both"
            )
        return self

    @model_validator(mode="after")
    def _quorum_can_be_met(self) -> Self:
        if self.quorum is not None and self.quorum > self.min_sites:
            raise ValueError(
                f"quorum is {self.quorum} but min_sites is {self.min_sites}: a round could pick too few "
                "sites to ever meet it; raise min_sites or lower quorum"
            )
        return self
