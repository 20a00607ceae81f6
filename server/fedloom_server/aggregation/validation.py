"""Whether an uploaded file may count: checked before it reaches any aggregator."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import Decoder
from fedloom_common.codecs.spec import AS_IS, AnyStage
from fedloom_common.errors import BadTensor
from fedloom_common.floats import first_not_finite, value_at
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import ITEM_BYTES, Manifest, TensorInfo, read_into

PIECE_BYTES = 512 << 10  # stays in a core's L2 cache between the read and the check


def validate_update(
    path: Path, base: Path, stages: Sequence[AnyStage] = AS_IS, base_digest: str = ""
) -> None:
    """Check an update's file against the model that it belongs to.

    Memory: one piece, whatever the size of the file; a few for encoded updates.

    Raises:
        BadTensor: the file is not safetensors, its tensors are not those that the model's become, or a
            value of the update is NaN, infinite or beyond its type's range.
    """
    chain = Chain(stages)
    if chain.is_as_is:
        _require_finite_model(path, Manifest.read(base))
        return
    with TensorFile(base) as model, Decoder(path, chain, base=model, base_digest=base_digest) as decoder:
        decoder.check()


def _require_finite_model(path: Path, wanted: Manifest) -> None:
    update = Manifest.read(path)
    wanted.require_same_tensors(update)
    buffer = np.empty(PIECE_BYTES, np.uint8)
    with path.open("rb", buffering=0) as file:
        for info in update.tensors:
            if info.is_float:
                _require_finite(file.fileno(), info, buffer)


def _require_finite(descriptor: int, info: TensorInfo, buffer: NDArray[np.uint8]) -> None:
    for offset_bytes in range(0, info.size_bytes, PIECE_BYTES):
        raw = buffer[: min(PIECE_BYTES, info.size_bytes - offset_bytes)]
        read_into(descriptor, raw.data, info.start_bytes + offset_bytes)
        found = first_not_finite(raw, info.dtype)
        if found is None:
            continue
        flat = offset_bytes // ITEM_BYTES[info.dtype] + found
        index = [int(place) for place in np.unravel_index(flat, info.shape)]
        value = value_at(raw, info.dtype, found)
        raise BadTensor(f"tensor {info.name} holds {value} at index {index}, wanted finite values")
