"""How updates lie to each other: the inner products of their changes, in one pass over the files."""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from fedloom_common.controls import is_control
from fedloom_common.errors import BadTensor
from fedloom_common.tensors import Manifest, TensorInfo
from fedloom_server.aggregation.aligned import Aligned, Joined
from fedloom_server.aggregation.output import NextModel, Values
from fedloom_server.aggregation.pieces import Piece, each_piece, in_order


def gram_matrix(joined: Joined) -> Values:
    """⟨Δᵢ, Δⱼ⟩ for every two updates, with Δᵢ the change of update i against the present model, in float64.

    Control variates do not count.

    The same bytes however many threads compute it.

    Memory: that of :class:`Aligned`, and a small matrix for each piece that waits for one before it.

    Raises:
        BadTensor: the square of a change leaves the range of float64; names the site.
    """
    tensors = Manifest.read(joined.base).tensors
    infos = [info for info in tensors if info.is_float and not is_control(info.name)]
    total = _OrderedSum(infos, len(joined.updates))

    def make(stack: ExitStack) -> Callable[[Piece], None]:
        products = _Products(joined.open(stack))
        return lambda piece: total.add(piece, products.of(piece))

    each_piece(infos, make, most_threads=joined.most_threads)
    _require_finite(total.value, joined)
    return total.value


def squared_distances(gram: Values) -> Values:
    """‖Δᵢ − Δⱼ‖² = ⟨Δᵢ, Δᵢ⟩ + ⟨Δⱼ, Δⱼ⟩ − 2⟨Δᵢ, Δⱼ⟩."""
    norms = np.diag(gram)
    distances: NDArray[np.float64] = np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0)
    np.fill_diagonal(distances, 0)
    return distances


def _require_finite(gram: Values, joined: Joined) -> None:
    bad = np.flatnonzero(~np.isfinite(np.diag(gram)))
    if len(bad):
        raise BadTensor(
            f"the update of site {joined.updates[bad[0]].site} is too far from its model: the square of its "
            "change leaves the range of float64"
        )


class _Products:
    """Inner products over a piece; for one thread."""

    def __init__(self, aligned: Aligned) -> None:
        self._aligned = aligned
        self._present = NextModel(aligned.chain, aligned.base)

    def of(self, piece: Piece) -> Values:
        total: Values = np.zeros(())
        tells_changes = self._aligned.chain.tells_changes(piece.info)
        with np.errstate(over="ignore", invalid="ignore"):  # told when all are summed
            for part, matrix in self._aligned.blocks(piece):
                if not tells_changes:
                    values = np.empty(part.count)
                    self._present.present(part, values)
                    np.subtract(matrix, values, out=matrix)
                total = total + matrix @ matrix.T
        return total


class _OrderedSum:
    """A sum over pieces, taken in their order whichever is there first: else its last bits would differ."""

    def __init__(self, infos: Sequence[TensorInfo], updates: int) -> None:
        self.value: Values = np.zeros((updates, updates))
        self._order = in_order(infos)
        self._next = next(self._order, None)
        self._waiting: dict[tuple[str, int], Values] = {}
        self._lock = threading.Lock()

    def add(self, piece: Piece, term: Values) -> None:
        with self._lock, np.errstate(over="ignore", invalid="ignore"):
            self._waiting[piece.info.name, piece.start] = term
            while self._next and (key := (self._next.info.name, self._next.start)) in self._waiting:
                self.value += self._waiting.pop(key)
                self._next = next(self._order, None)
