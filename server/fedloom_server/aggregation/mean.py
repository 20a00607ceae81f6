"""The weighted mean of updates, folded from their files in pieces that fit a core's cache."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.spec import AS_IS, AnyStage
from fedloom_common.errors import TooFewUpdates
from fedloom_common.files import atomic_file
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import Manifest
from fedloom_server.aggregation.output import NextModel, TensorPlaces, write_model
from fedloom_server.aggregation.pieces import PIECE_VALUES, Piece, each_piece
from fedloom_server.aggregation.sources import Source, source_of

if TYPE_CHECKING:
    from fedloom_server.aggregation import Update

EXAMPLES_KEY = "fedloom.examples"
_SCALE = -64  # examples are below 2**53: a sum of thousands of float64 values, so scaled, cannot overflow


class WeightedMean:
    """θ + Σ nₖ/n sₖ (θₖ − θ_bₖ)  over the updates, in float64, rounded once to the model's types.

    θ is the present model, θ_bₖ the one that site k started from, and sₖ what its change counts. Of a
    fresh update both models are the same and sₖ is 1, and of such updates alone that is  Σ nₖ/n θₖ,
    and so computed.

    Some updates may be folded before the others are there, into a *sum*: a file of Σ nₖ θₖ in float64
    with n in its metadata; of encoded updates it is the sum of their changes, and of stale ones that of
    θ + sₖ (θₖ − θ_bₖ), so that a sum belongs to the model that it is taken for. Values are added in the
    order of the updates, so that the mean has the same bytes in however many steps it is taken. Tensors
    that are not floats are the base model's.

    Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1; with stale updates Nguyen et al. 2022,
    arXiv:2106.06639, algorithm 1, weighted by examples.
    Memory: about 5 MiB for each of a few threads, whatever the size of the model; encoded updates need
    up to 1 MiB more each, stale ones up to 3 MiB.
    """

    def __init__(self, stages: Sequence[AnyStage] = AS_IS, base_digest: str = "") -> None:
        """``stages`` tell how updates are encoded, against the base model of that digest."""
        self._stages = stages
        self._base_digest = base_digest

    def fold(
        self, base: Path, updates: Sequence["Update"], out: Path, *, earlier: Path | None = None
    ) -> None:
        """Write the sum of an ``earlier`` sum and these updates to ``out``.

        Raises:
            BadTensor: an update's tensors differ from the base model's, or its examples are not positive.
        """
        inputs = _Inputs(base, updates, earlier, self._stages, self._base_digest)
        infos = [info for info in Manifest.read(base).tensors if info.is_float]
        entries = [(info.name, "F64", info.shape) for info in infos]
        with atomic_file(out, durable=False) as file:
            places = TensorPlaces(file.fileno(), entries, {EXAMPLES_KEY: str(inputs.examples)})
            each_piece(infos, lambda stack: places.writing(inputs.open(stack).sum))

    def aggregate(
        self, base: Path, updates: Sequence["Update"], out: Path, *, earlier: Path | None = None
    ) -> None:
        """Write the mean of an ``earlier`` sum and these updates to ``out``, durable.

        Raises:
            TooFewUpdates: there is nothing to average.
            BadTensor: as for :meth:`fold`, or the mean of some tensor is not finite.
        """
        if not updates and earlier is None:
            raise TooFewUpdates("no update to average: a mean needs at least one")
        inputs = _Inputs(base, updates, earlier, self._stages, self._base_digest)
        write_model(base, out, lambda stack: inputs.open(stack).mean)


@dataclass(frozen=True)
class _Inputs:
    """What is averaged."""

    base: Path
    updates: Sequence["Update"]
    earlier: Path | None
    stages: Sequence[AnyStage]
    base_digest: str

    @property
    def examples(self) -> int:
        """n, those of the earlier sum included."""
        before = int(Manifest.read(self.earlier).metadata[EXAMPLES_KEY]) if self.earlier else 0
        return before + sum(update.examples for update in self.updates)

    def open(self, stack: ExitStack) -> "_Fold":
        """All files, open for one thread."""
        chain, base = Chain(self.stages), stack.enter_context(TensorFile(self.base))
        sources = [
            stack.enter_context(source_of(update, chain, base, self.base_digest)) for update in self.updates
        ]
        earlier = stack.enter_context(TensorFile(self.earlier)) if self.earlier else None
        return _Fold(chain, base, sources, earlier, math.ldexp(self.examples, _SCALE))


class _Fold:
    """Averages a piece at a time, always in the order of the sources."""

    def __init__(
        self,
        chain: Chain,
        base: TensorFile,
        sources: Sequence[Source],
        earlier: TensorFile | None,
        weight: float,
    ) -> None:
        self._sources, self._earlier = sources, earlier
        self._weight = weight
        self._total, self._term = np.empty(PIECE_VALUES), np.empty(PIECE_VALUES)
        self._next = NextModel(chain, base)

    def sum(self, piece: Piece) -> NDArray[np.uint8]:
        """Bytes of the weighted sum; valid until the next call."""
        total, term = self._total[: piece.count], self._term[: piece.count]
        if self._earlier is None:
            total.fill(0)
        else:
            self._earlier.read(piece.info.name, piece.start * total.itemsize, total.view(np.uint8).data)
        with np.errstate(over="ignore", invalid="ignore"):  # told when the mean is taken
            for source in self._sources:
                source.read(piece.info, piece.start, term)
                np.multiply(term, math.ldexp(source.examples, _SCALE), out=term)
                np.add(total, term, out=total)
        return total.view(np.uint8)

    def mean(self, piece: Piece) -> NDArray[np.uint8]:
        """Bytes of the next model; valid until the next call."""
        if not piece.info.is_float:
            return self._next.carried(piece)
        total = self.sum(piece).view(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # told when it is rounded
            np.divide(total, self._weight, out=total)
            return self._next.rounded(piece, total)
