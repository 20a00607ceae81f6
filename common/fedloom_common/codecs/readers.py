"""Readers of one coded tensor's change by piece, whichever way its parts are stored."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom_common.codecs.chain import Chain, Layout
from fedloom_common.codecs.storage import parts_reader
from fedloom_common.codecs.topk import indices_of
from fedloom_common.codecs.values import PIECE_VALUES, Raw, Values
from fedloom_common.errors import BadTensor
from fedloom_common.tensors import TensorInfo, read_into


class TensorReader(Protocol):
    """One tensor's change by piece."""

    def change(self, piece: int, values: Values) -> None:
        """Fill ``values`` with a piece of the tensor's change.

        Raises:
            BadTensor: the piece's parts are not what the codec makes.
        """

    def limit(self, piece: int) -> float:
        """A magnitude that no value of a piece exceeds; checks the piece's parts.

        Raises:
            BadTensor: they are not what the codec makes, or a value is not finite.
        """

    def bits(self, piece: int) -> Raw:
        """The difference of bit patterns, from an exact chain."""


def tensor_reader(
    chain: Chain, layout: Layout, infos: Mapping[str, TensorInfo], descriptor: int
) -> TensorReader:
    """A reader of one coded tensor in an open file, whose parts lie as ``infos`` tells.

    Raises:
        BadTensor: the tensor's tables of frames or counts do not add up.
    """
    kind = _SparseReader if layout.is_sparse else _DenseReader
    return kind(chain, layout, infos, descriptor)


class _DenseReader:
    """All values are told."""

    def __init__(
        self, chain: Chain, layout: Layout, infos: Mapping[str, TensorInfo], descriptor: int
    ) -> None:
        self._codec = chain.values
        self._parts = parts_reader(chain, layout, infos, descriptor)

    def change(self, piece: int, values: Values) -> None:
        self._codec.decode(self._parts.read(piece), values)

    def limit(self, piece: int) -> float:
        return self._codec.limit(self._parts.read(piece))

    def bits(self, piece: int) -> Raw:
        return self._parts.read(piece)[0]


class _SparseReader:
    """Only kept values are told; the piece of them that was read last is held."""

    def __init__(
        self, chain: Chain, layout: Layout, infos: Mapping[str, TensorInfo], descriptor: int
    ) -> None:
        self._codec, self._layout = chain.values, layout
        self._ends = _kept_until(layout, infos[layout.name(".count")], descriptor)
        self._parts = parts_reader(chain, layout, infos, descriptor)
        self._held, self._limit = -1, 0.0
        self._gaps = np.empty(0, "<u2")
        self._values = np.empty(layout.piece_items(0), np.float32)

    def change(self, piece: int, values: Values) -> None:
        values.fill(0)
        gaps, kept, _ = self._kept(piece)
        values[indices_of(gaps, len(values))] = kept

    def limit(self, piece: int) -> float:
        gaps, _, limit = self._kept(piece)
        indices_of(gaps, self._layout.piece_values(piece))
        return limit

    def bits(self, piece: int) -> Raw:
        raise AssertionError("top-k is not exact")

    def _kept(self, piece: int) -> tuple[NDArray[np.uint16], Values, float]:
        """A piece's gaps and kept values, from the pieces of items that hold them, and their limit."""
        start, end = int(self._ends[piece]), int(self._ends[piece + 1])
        gaps, kept, limit = [self._gaps[:0]], [self._values[:0]], 0.0
        while start < end:
            held, first = divmod(start, PIECE_VALUES)
            self._hold(held)
            until = min(end - held * PIECE_VALUES, PIECE_VALUES)
            gaps.append(self._gaps[first:until].copy())
            kept.append(self._values[first:until].copy())
            limit = max(limit, self._limit)
            start += until - first
        return np.concatenate(gaps), np.concatenate(kept), limit

    def _hold(self, held: int) -> None:
        if held == self._held:
            return
        self._held = -1  # should the next lines fail, nothing is held
        raws = self._parts.read(held)
        self._limit = self._codec.limit(raws[1:])
        self._codec.decode(raws[1:], self._values[: self._layout.piece_items(held)])
        self._gaps = raws[0].view("<u2")
        self._held = held


def _kept_until(layout: Layout, info: TensorInfo, descriptor: int) -> NDArray[np.int64]:
    """How many values are kept before each piece of the tensor, and in all."""
    counts = np.empty(layout.pieces, "<u4")
    read_into(descriptor, counts.view(np.uint8).data, info.start_bytes)
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    if counts.max() > PIECE_VALUES or counts[-1] > layout.piece_values(layout.pieces - 1):
        raise BadTensor(f"a piece keeps {counts.max()} values, more than it has")
    if ends[-1] != layout.items:
        raise BadTensor(f"its pieces keep {ends[-1]} values together, wanted {layout.items}")
    return ends
