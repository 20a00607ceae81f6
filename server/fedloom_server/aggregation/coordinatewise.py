"""Rules that look at each value by itself: the median and the trimmed mean of the updates' values."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedloom_common.codecs.spec import AS_IS, AnyStage
from fedloom_common.runspec import MedianRule, TrimmedMeanRule
from fedloom_server.aggregation.aligned import Aligned, Joined
from fedloom_server.aggregation.ordering import sort_columns
from fedloom_server.aggregation.output import NextModel, Raw, Values, write_model
from fedloom_server.aggregation.pieces import PIECE_VALUES, Piece

if TYPE_CHECKING:
    from fedloom_server.aggregation import Update

CentreOf = Callable[[Values], Values]
"""From a matrix in which every column, an update in each row, is in rising order, to a value a column."""


def median(matrix: Values) -> Values:
    """The middle value, or the mean of the two in the middle."""
    middle: Values = matrix[(len(matrix) - 1) // 2 : len(matrix) // 2 + 1]
    total = np.zeros(matrix.shape[1:])
    for row in middle / len(middle):  # divided first: a sum may leave the range
        total += row
    return total


def trimmed_mean(matrix: Values, cut: int) -> Values:
    """The mean without the ``cut`` largest and smallest values."""
    kept = matrix[cut : len(matrix) - cut]
    total = np.zeros(matrix.shape[1:])
    for row in kept:  # one after the other: the same bytes however rows lie in memory
        total += row
    total /= len(kept)
    return total


class CoordinateMedian:
    """The median of each value over the updates, unweighted.

    As long as fewer than half of the updates are bad, each value lies between values of good ones.

    Source: Yin et al. 2018, arXiv:1803.01498, definition 1.
    Memory: 2 MiB for each of a few threads for up to 128 updates, more with their number beyond; encoded
    updates 1 MiB each.
    """

    def __init__(self, rule: MedianRule, stages: Sequence[AnyStage] = AS_IS, base_digest: str = "") -> None:
        self._rule, self._stages, self._base_digest = rule, stages, base_digest

    def aggregate(self, base: Path, updates: Sequence["Update"], out: Path) -> None:
        """Write the median to ``out``, durable."""
        joined = Joined(base=base, base_digest=self._base_digest, stages=self._stages, updates=updates)
        joined.require(1, self._rule.name)
        _write(joined, out, median)


class TrimmedMean:
    """The mean of each value over the updates, without its largest and smallest ones, unweighted.

    As long as no more updates are bad than are cut on each side, each value lies between values of good ones.

    Source: Yin et al. 2018, arXiv:1803.01498, definition 2.
    Memory: as for the median.
    """

    def __init__(
        self, rule: TrimmedMeanRule, stages: Sequence[AnyStage] = AS_IS, base_digest: str = ""
    ) -> None:
        self._rule, self._stages, self._base_digest = rule, stages, base_digest

    def aggregate(self, base: Path, updates: Sequence["Update"], out: Path) -> None:
        """Write the trimmed mean to ``out``, durable."""
        joined = Joined(base=base, base_digest=self._base_digest, stages=self._stages, updates=updates)
        joined.require(self._rule.needed_updates(), self._rule.name)
        cut = self._rule.cut(len(updates))
        _write(joined, out, lambda matrix: trimmed_mean(matrix, cut))


def _write(joined: Joined, out: Path, centre_of: CentreOf) -> None:
    def make(stack: ExitStack) -> Callable[[Piece], Raw]:
        return _Centre(joined.open(stack), centre_of).bytes_of

    write_model(joined.base, out, make, most_threads=joined.most_threads)


class _Centre:
    """Makes a piece of the next model at a time."""

    def __init__(self, aligned: Aligned, centre_of: CentreOf) -> None:
        self._aligned, self._centre_of = aligned, centre_of
        self._next = NextModel(aligned.chain, aligned.base)
        self._values = np.empty(PIECE_VALUES)

    def bytes_of(self, piece: Piece) -> Raw:
        if not piece.info.is_float:
            return self._next.carried(piece)
        for part, matrix in self._aligned.blocks(piece):
            begin = part.start - piece.start
            self._values[begin : begin + part.count] = self._centre_of(sort_columns(matrix))
        return self._next.rounded(piece, self._values[: piece.count])
