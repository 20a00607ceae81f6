"""Top-k: which values of a tensor are kept, and how their places are told.

Source: Stich et al. 2018, arXiv:1809.07599 (sparsified SGD with memory);
Lin et al. 2018, arXiv:1712.01887 (deep gradient compression).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom_common.codecs.values import Values
from fedloom_common.errors import BadTensor

_LOW_BITS = 16
_LOW_COUNT, _HIGH_COUNT = 1 << _LOW_BITS, 1 << (31 - _LOW_BITS)


def kept(values: int, fraction: float) -> int:
    """k: how many of a tensor's values are kept."""
    return min(values, max(1, math.ceil(values * fraction)))


@dataclass(frozen=True)
class Threshold:
    """What tells the k values of largest magnitude from all others."""

    bits: int
    """Magnitude of the smallest value kept, as a float32's bits: these are in the order of the values."""
    ties: int
    """How many values of this very magnitude are kept: the first."""


def find_threshold(pieces: Callable[[], Iterator[Values]], keep: int) -> Threshold:
    """The threshold of a tensor that comes in pieces, twice.

    Memory: two histograms, whatever the size of the tensor and of ``keep``.
    """
    high = _HighBits(keep)
    for values in pieces():
        high.add(magnitudes(values))
    upper, above = high.threshold()
    counts = np.zeros(_LOW_COUNT, np.int64)
    for values in pieces():
        bits = magnitudes(values)
        inside = bits[np.flatnonzero(bits >> _LOW_BITS == upper)]
        counts += np.bincount(inside & (_LOW_COUNT - 1), minlength=_LOW_COUNT)
    lower, above = _largest(counts, keep, above)
    return Threshold(bits=upper << _LOW_BITS | lower, ties=keep - above)


def magnitudes(values: Values) -> NDArray[np.uint32]:
    """Each value without its sign, as integers in the same order."""
    return values.view(np.uint32) & np.uint32(0x7FFF_FFFF)


class _HighBits:
    """Histogram of the upper bits of magnitudes, of those that can still be among the largest."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._counts = np.zeros(_HIGH_COUNT, np.int64)
        self._floor = 0
        self._counted = 0

    def add(self, bits: NDArray[np.uint32]) -> None:
        if self._floor:
            bits = bits[np.flatnonzero(bits >= self._floor << _LOW_BITS)]
        self._counts += np.bincount(bits >> _LOW_BITS, minlength=_HIGH_COUNT)
        self._counted += len(bits)
        if self._counted >= 2 * self._keep:  # counting is slow: pass over what is beaten already
            self._floor, above = _largest(self._counts, self._keep, 0)
            self._counted = above + int(self._counts[self._floor])

    def threshold(self) -> tuple[int, int]:
        return _largest(self._counts, self._keep, 0)


def _largest(counts: NDArray[np.int64], keep: int, above: int) -> tuple[int, int]:
    """The bin in which the ``keep`` largest end, and how many lie above it."""
    at_least = above + np.cumsum(counts[::-1])[::-1]
    place = int(np.flatnonzero(at_least >= keep)[-1])
    return place, int(at_least[place] - counts[place])


class Picker:
    """Picks a tensor's kept values, piece after piece."""

    def __init__(self, threshold: Threshold) -> None:
        self._bits, self._ties = threshold.bits, threshold.ties

    def pick(self, values: Values) -> NDArray[np.intp]:
        """Indices of the values of the next piece that are kept, in order."""
        bits = magnitudes(values)
        indices = np.flatnonzero(bits >= self._bits)
        tied = bits[indices] == self._bits
        beyond = np.cumsum(tied) > self._ties
        self._ties -= min(self._ties, int(np.count_nonzero(tied)))
        kept: NDArray[np.intp] = indices[~(tied & beyond)]
        return kept


def gaps_of(indices: NDArray[np.intp]) -> NDArray[np.uint16]:
    """Values left out before each index of a piece: small numbers, and increasing indices by construction."""
    return (np.diff(indices, prepend=-1) - 1).astype(np.uint16)


def indices_of(gaps: NDArray[np.uint16], values: int) -> NDArray[np.int64]:
    """The indices in a piece of so many values.

    Raises:
        BadTensor: one lies beyond the piece.
    """
    indices = np.cumsum(gaps, dtype=np.int64)
    indices += np.arange(len(gaps))
    if len(indices) and indices[-1] >= values:
        raise BadTensor(f"the gaps lead to value {indices[-1]} of a piece of {values}")
    return indices
