"""The same values of every update side by side, for rules that look at all updates at once."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.spec import AnyStage
from fedloom_common.errors import BadTensor, TooFewUpdates
from fedloom_common.tensorfiles import TensorFile
from fedloom_server.aggregation.output import Values
from fedloom_server.aggregation.pieces import MOST_THREADS, PIECE_VALUES, Piece
from fedloom_server.aggregation.sources import source_of

if TYPE_CHECKING:
    from fedloom_server.aggregation import Update

BLOCK_VALUES = 1 << 18  # of all updates together, 2 MiB in float64: stays in the cache while it is worked on
LEAST_WIDTH = 1 << 11  # below this, calls cost more than the work on their values
MOST_MATRICES_BYTES = 64 << 20  # of all threads together; further threads wait for nobody


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The updates of a round, with what they are read by."""

    base: Path
    base_digest: str
    stages: Sequence[AnyStage]
    updates: Sequence["Update"]

    def require(self, needed: int, rule: str) -> None:
        """Check that there are enough updates.

        Raises:
            TooFewUpdates: says how many came, and how many the rule needs.
        """
        if not self.updates:
            raise TooFewUpdates("no update to aggregate: a rule needs at least one")
        if len(self.updates) < needed:
            raise TooFewUpdates(f"{len(self.updates)} updates came, {rule} needs {needed} or more")

    @property
    def width(self) -> int:
        """Values of each update in a block; codecs give whole pieces only."""
        if not Chain(self.stages).is_as_is:
            return PIECE_VALUES
        return min(PIECE_VALUES, max(LEAST_WIDTH, BLOCK_VALUES // len(self.updates)))

    @property
    def most_threads(self) -> int:
        """Threads that may each hold a block."""
        block_bytes = 8 * len(self.updates) * self.width
        return max(1, min(MOST_THREADS, MOST_MATRICES_BYTES // block_bytes))

    def open(self, stack: ExitStack) -> "Aligned":
        """All files, open for one thread."""
        chain, base = Chain(self.stages), stack.enter_context(TensorFile(self.base))
        return Aligned(self, stack, chain, base)


class Aligned:
    """All updates, open, as matrices with a row for each; for one thread."""

    def __init__(self, joined: Joined, stack: ExitStack, chain: Chain, base: TensorFile) -> None:
        self.chain, self.base = chain, base
        self._sites = [update.site for update in joined.updates]
        digest = joined.base_digest
        self._sources = [stack.enter_context(source_of(u, chain, base, digest)) for u in joined.updates]
        self._width = joined.width
        self._matrix = np.empty(len(self._sources) * self._width)

    def blocks(self, piece: Piece) -> Iterator[tuple[Piece, NDArray[np.float64]]]:
        """Each part of a piece of a float tensor with its matrix, a row for each update: of changes if the
        chain tells these, else of values. The next part overwrites the matrix.

        Raises:
            BadTensor: a value is not finite; names the site.
        """
        for begin in range(0, piece.count, self._width):
            part = Piece(piece.info, piece.start + begin, min(self._width, piece.count - begin))
            matrix = self._matrix[: len(self._sources) * part.count].reshape(-1, part.count)
            for source, row in zip(self._sources, matrix, strict=True):
                source.read(part.info, part.start, row)
            self._require_finite(part, matrix)
            yield part, matrix

    def _require_finite(self, part: Piece, matrix: Values) -> None:
        if np.isfinite(matrix).all():
            return
        bad = int(np.argmin(np.isfinite(matrix).all(axis=1)))
        raise BadTensor(f"tensor {part.info.name} is not finite in the update of site {self._sites[bad]}")
