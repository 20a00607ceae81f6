"""Rules by which the updates of a round become the next global model.

A rule reads spooled update files piece by piece and writes a model file; it
knows nothing of sites' sessions, rounds or the store.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from fedloom_common.codecs.spec import AS_IS, AnyStage
from fedloom_common.runspec import (
    Aggregation,
    GeometricMedianRule,
    KrumRule,
    MeanRule,
    MedianRule,
    MultiKrumRule,
    TrimmedMeanRule,
)
from fedloom_server.aggregation.coordinatewise import CoordinateMedian, TrimmedMean
from fedloom_server.aggregation.mean import WeightedMean
from fedloom_server.aggregation.shares import SharedMean
from fedloom_server.aggregation.staleness import staleness_factor

__all__ = [
    "Aggregator",
    "BaseModel",
    "FoldingAggregator",
    "Update",
    "aggregator_for",
    "staleness_factor",
]


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A global model that a site started from."""

    path: Path
    digest: str


@dataclass(frozen=True, kw_only=True)
class Update:
    """One site's valid update, whole and on disk."""

    site: str
    path: Path
    examples: int
    """nₖ: training examples that the site used."""
    base: BaseModel | None = None
    """The older global model that the site started from; None if it is the one that is aggregated on."""
    factor: float = 1.0
    """sₖ: what the change counts, such as :func:`staleness_factor`."""
    clip: float = 1.0
    """What the change of the model's own tensors, all but control variates, is multiplied by besides."""


class Aggregator(Protocol):
    """Makes a model file of the updates of a round."""

    def aggregate(self, base: Path, updates: Sequence[Update], out: Path) -> None:
        """Write what the updates come to, to ``out``, whole or not at all.

        ``base`` is the present model, which the sites started from unless an update names its own. The
        same updates in the same order give the same bytes, however many threads work.

        Memory: a few pieces, whatever the size of the model.

        Raises:
            TooFewUpdates: there are fewer than the rule needs.
            BadTensor: an update cannot be aggregated; the message names its site.
        """


@runtime_checkable
class FoldingAggregator(Aggregator, Protocol):
    """A rule that can take some updates before the others are there; the bytes are the same in the end."""

    def fold(self, base: Path, updates: Sequence[Update], out: Path, *, earlier: Path | None = None) -> None:
        """Write what some updates and an ``earlier`` such file come to: they are not needed any more.

        Raises:
            BadTensor: an update cannot be aggregated; the message names its site.
        """

    def aggregate(
        self, base: Path, updates: Sequence[Update], out: Path, *, earlier: Path | None = None
    ) -> None:
        """Write what the updates and what was folded ``earlier`` come to."""


def aggregator_for(
    spec: Aggregation, stages: Sequence[AnyStage] = AS_IS, base_digest: str = ""
) -> Aggregator:
    """The rule that a run spec asks for, on updates that are encoded by ``stages`` against a base model."""
    match spec.rule:
        case MedianRule():
            return CoordinateMedian(spec.rule, stages, base_digest)
        case TrimmedMeanRule():
            return TrimmedMean(spec.rule, stages, base_digest)
        case KrumRule() | MultiKrumRule() | GeometricMedianRule():
            return SharedMean(spec.rule, stages, base_digest)
        case MeanRule():
            return WeightedMean(stages, base_digest)
