"""Rules that weigh whole updates by how these lie to each other: Krum, multi-Krum, the geometric median."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.spec import AS_IS, AnyStage
from fedloom_common.runspec import GeometricMedianRule, KrumRule, MultiKrumRule
from fedloom_common.tensorfiles import TensorFile
from fedloom_server.aggregation.aligned import Joined
from fedloom_server.aggregation.geometricmedian import geometric_median_shares
from fedloom_server.aggregation.gram import gram_matrix
from fedloom_server.aggregation.krum import krum_shares
from fedloom_server.aggregation.output import NextModel, Raw, Values, write_model
from fedloom_server.aggregation.pieces import PIECE_VALUES, Piece
from fedloom_server.aggregation.sources import source_of

if TYPE_CHECKING:
    from fedloom_server.aggregation import Update


class SharedMean:
    """Σ pₖ θₖ / Σ pₖ  with shares that follow from how the updates lie to each other.

    Memory: 2 MiB for each of a few threads for up to 128 updates, more with their number beyond; encoded
    updates 1 MiB each. Of n updates n² numbers for each of a few pieces besides.
    """

    def __init__(
        self,
        rule: KrumRule | MultiKrumRule | GeometricMedianRule,
        stages: Sequence[AnyStage] = AS_IS,
        base_digest: str = "",
    ) -> None:
        self._rule, self._stages, self._base_digest = rule, stages, base_digest

    def aggregate(self, base: Path, updates: Sequence["Update"], out: Path) -> None:
        """Write the mean by shares to ``out``, durable."""
        joined = Joined(base=base, base_digest=self._base_digest, stages=self._stages, updates=updates)
        is_krum = not isinstance(self._rule, GeometricMedianRule)
        joined.require(self._rule.needed_updates() if is_krum else 1, self._rule.name)
        shares = self._shares(gram_matrix(joined), [update.examples for update in updates])
        counted = [(float(share), update) for share, update in zip(shares, updates, strict=True) if share]

        def make(stack: ExitStack) -> Callable[[Piece], Raw]:
            return _Mean(joined, counted, stack).bytes_of

        write_model(base, out, make)

    def _shares(self, gram: Values, examples: Sequence[int]) -> Values:
        if isinstance(self._rule, GeometricMedianRule):
            return geometric_median_shares(gram, examples, self._rule)
        return krum_shares(gram, examples, self._rule)


class _Mean:
    """Makes a piece of the next model at a time."""

    def __init__(self, joined: Joined, counted: Sequence[tuple[float, "Update"]], stack: ExitStack) -> None:
        chain, base = Chain(joined.stages), stack.enter_context(TensorFile(joined.base))
        self._sources = [
            (share, stack.enter_context(source_of(update, chain, base, joined.base_digest)))
            for share, update in counted
        ]
        self._sum = sum(share for share, _ in counted)
        self._next = NextModel(chain, base)
        self._total, self._term = np.empty(PIECE_VALUES), np.empty(PIECE_VALUES)

    def bytes_of(self, piece: Piece) -> Raw:
        if not piece.info.is_float:
            return self._next.carried(piece)
        total, term = self._total[: piece.count], self._term[: piece.count]
        total.fill(0)
        with np.errstate(over="ignore", invalid="ignore"):  # told when it is rounded
            for share, source in self._sources:
                source.read(piece.info, piece.start, term)
                np.multiply(term, share, out=term)
                np.add(total, term, out=total)
            np.divide(total, self._sum, out=total)
        return self._next.rounded(piece, total)
