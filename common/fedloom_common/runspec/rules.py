"""A run spec's aggregation rules: what each is told, and how many updates it needs for what it promises."""

from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fedloom_common.strict import Strict, by_name


class MeanRule(Strict):
    """The weighted mean  Σ nₖ/n θₖ  (FedAvg); one bad update can move it anywhere."""

    name: Literal["weighted_mean"] = "weighted_mean"

    @property
    def is_robust(self) -> bool:
        """Whether some bad updates leave it near the good ones."""
        return False

    def needed_updates(self) -> int:
        """Updates without which the rule cannot be applied."""
        return 1


class _Robust(Strict):
    @property
    def is_robust(self) -> bool:
        """Whether some bad updates leave it near the good ones."""
        return True

    def needed_updates(self) -> int:
        """Updates without which the rule cannot be applied."""
        return 1


class MedianRule(_Robust):
    """The median of each value, unweighted: fewer than half of the updates may be bad."""

    name: Literal["median"] = "median"

    def needed_updates(self) -> int:
        """Of two a median is their mean."""
        return 3


class TrimmedMeanRule(_Robust):
    """The mean of each value, unweighted, without the largest and the smallest ones."""

    name: Literal["trimmed_mean"] = "trimmed_mean"
    byzantine: int | None = Field(default=None, ge=1, le=10_000)
    """Values cut on each side: so many updates may be bad; give this or ``trim``."""
    trim: float | None = Field(default=None, gt=0, lt=0.5)
    """Share of the updates cut on each side, rounded down; give this or ``byzantine``."""

    def cut(self, updates: int) -> int:
        """Values that are cut on each side of so many."""
        if self.byzantine is not None:
            return self.byzantine
        return int(Fraction(str(self.trim)) * updates)  # exact: 0.29 of 100 are 29

    def needed_updates(self) -> int:
        """One value must be left, and one be cut on each side."""
        if self.byzantine is not None:
            return 2 * self.byzantine + 1
        return -int(-1 // Fraction(str(self.trim)))

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.byzantine is None) == (self.trim is None):
            raise ValueError("give either byzantine (values cut on each side) or trim (their share)")
        return self


class KrumRule(_Robust):
    """The one update that lies closest to its neighbours, unweighted."""

    name: Literal["krum"] = "krum"
    byzantine: int = Field(ge=0, le=10_000)
    """f, updates that may be bad."""

    def needed_updates(self) -> int:
        """n > 2f + 2, for the proof to hold."""
        return 2 * self.byzantine + 3


class MultiKrumRule(_Robust):
    """The mean of the updates that lie closest to their neighbours."""

    name: Literal["multi_krum"] = "multi_krum"
    byzantine: int = Field(ge=0, le=10_000)
    """f, updates that may be bad."""
    selected: int | None = Field(default=None, ge=1, le=10_000)
    """m, updates that are averaged, at most n − f − 2; as many as that if not given."""
    weighted: bool = False
    """Whether these weigh by their examples; if not, all weigh the same."""

    def needed_updates(self) -> int:
        """n > 2f + 2 and m ≤ n − f − 2, for the proof to hold."""
        return max(2 * self.byzantine + 3, (self.selected or 1) + self.byzantine + 2)


class GeometricMedianRule(_Robust):
    """The model with the least sum of distances to the updates: fewer than half of the weight may be bad."""

    name: Literal["geometric_median"] = "geometric_median"
    weighted: bool = True
    """Whether an update weighs by its examples; if not, all weigh the same."""
    smoothing: float = Field(default=1e-6, gt=0)
    """ν, the distance below which an update draws no stronger."""
    iterations: int = Field(default=1000, ge=1, le=100_000)
    """Steps of Weiszfeld's algorithm at most; it ends when nothing moves any more."""

    def needed_updates(self) -> int:
        """Of two, every model between both has the least sum of distances."""
        return 3


AnyRule = MeanRule | MedianRule | TrimmedMeanRule | KrumRule | MultiKrumRule | GeometricMedianRule
RuleName = Literal["weighted_mean", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median"]


Rule = Annotated[
    Annotated[AnyRule, Field(discriminator="name")],
    BeforeValidator(by_name, json_schema_input_type=RuleName | AnyRule),
]
"""A field's type for a rule: ``median`` or ``{name: krum, byzantine: 1}``."""
