"""The server's half of SCAFFOLD: what the mean of the updates' control variates becomes.

That mean is  c + 1/|S| Σ Δcₖ  over the cohort S, and the algorithm wants  c + 1/N Σ Δcₖ,  where N is the
number of sites that the cohort was drawn from. With weights nₖ the sums are weighted alike.
Source: Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1, line 17.
"""

import os
from pathlib import Path
from typing import IO

import numpy as np

from fedloom_common.codecs.storage import TensorFile
from fedloom_common.controls import is_control
from fedloom_common.floats import decode, encode
from fedloom_common.tensors import ITEM_BYTES, TensorInfo
from fedloom_server.aggregation.pieces import PIECE_VALUES


def settle_controls(mean: Path, base: Path, share: float) -> None:
    """Scale, in place and durably, how far a mean's control variates are from the base model's.

    ``share`` is |S|/N. Memory: a few pieces.
    """
    with TensorFile(base) as before, TensorFile(mean) as after, mean.open("r+b", buffering=0) as file:
        for info in after.manifest.tensors:
            if is_control(info.name):
                _scale(info, before, after, share, file)
        os.fsync(file.fileno())


def _scale(info: TensorInfo, before: TensorFile, after: TensorFile, share: float, file: IO[bytes]) -> None:
    item = ITEM_BYTES[info.dtype]
    for start in range(0, info.size_bytes // item, PIECE_VALUES):
        count = min(PIECE_VALUES, info.size_bytes // item - start)
        raw, old, new = np.empty(count * item, np.uint8), np.empty(count), np.empty(count)
        for source, values in ((before, old), (after, new)):
            source.read(info.name, start * item, raw.data)
            decode(raw, info.dtype, values)
        encode(old + share * (new - old), info.dtype, raw)
        os.pwrite(file.fileno(), raw.data, info.start_bytes + start * item)
