"""The server's half of SCAFFOLD: what the mean of the updates' control variates becomes.

That mean is  c + Σ_S nₖ Δcₖ / Σ_S nₖ  over the cohort S, and the algorithm wants  c = Σ nₖ cₖ / W  over all
sites, with  W = N n̄:  N sites, which weigh n̄ on average. Whatever c holds beside that stays in it, and draws
every later round away from the optimum: so where sites join, or show what they weigh, c is scaled to the
new W. With equal nₖ and the same N in every round that is the paper's  c + 1/N Σ_S Δcₖ.
Source: Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1, line 17.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from fedloom_common.controls import is_control
from fedloom_common.floats import decode, encode
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import ITEM_BYTES, TensorInfo
from fedloom_server.aggregation.pieces import PIECE_VALUES


@dataclass(frozen=True, kw_only=True)
class Census:
    """The sites that c stands for after a round."""

    sites: int
    """N: those that a cohort could be drawn from, never fewer than in an earlier round."""
    weights: Mapping[str, int]
    """nₖ of the last update of each that took part; the others' cₖ is zero."""

    @property
    def total(self) -> float:
        """W."""
        if not self.weights:
            return 0.0
        return max(self.sites, len(self.weights)) * sum(self.weights.values()) / len(self.weights)


def settle_controls(mean: Path, base: Path, *, kept: float, share: float) -> None:
    """Replace, in place and durably, a mean's control variates c̄ by  kept · c + share · (c̄ − c).

    c are the base model's; ``kept`` is W of before the round over that of after it, ``share`` is Σ_S nₖ / W.
    Memory: a few pieces.
    """
    with TensorFile(base) as before, TensorFile(mean) as after, mean.open("r+b", buffering=0) as file:
        for info in after.manifest.tensors:
            if is_control(info.name):
                _settle(info, (before, after), (kept, share), file)
        os.fsync(file.fileno())


def _settle(
    info: TensorInfo, files: tuple[TensorFile, TensorFile], scales: tuple[float, float], file: IO[bytes]
) -> None:
    item, (before, after), (kept, share) = ITEM_BYTES[info.dtype], files, scales
    for start in range(0, info.size_bytes // item, PIECE_VALUES):
        count = min(PIECE_VALUES, info.size_bytes // item - start)
        raw, old, new = np.empty(count * item, np.uint8), np.empty(count), np.empty(count)
        for source, values in ((before, old), (after, new)):
            source.read(info.name, start * item, raw.data)
            decode(raw, info.dtype, values)
        encode(kept * old + share * (new - old), info.dtype, raw)
        os.pwrite(file.fileno(), raw.data, info.start_bytes + start * item)
