"""A model file as a rule writes it: like the base model, piece by piece, by a few threads at once."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom_common.codecs.chain import Chain
from fedloom_common.errors import BadTensor
from fedloom_common.files import atomic_file, flushing
from fedloom_common.floats import decode, encode, first_not_finite
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import ITEM_BYTES, Manifest, encode_header
from fedloom_server.aggregation.pieces import MOST_THREADS, PIECE_VALUES, Piece, each_piece

Values = NDArray[np.float64]
Raw = NDArray[np.uint8]


def write_model(
    base: Path,
    out: Path,
    make: Callable[[ExitStack], Callable[[Piece], Raw]],
    *,
    most_threads: int = MOST_THREADS,
) -> None:
    """Write a model with the base's names, types, shapes and metadata, whole or not at all, and durable.

    Each thread makes its own function, which gives a piece's bytes, with files that it opens on the stack.
    """
    model = Manifest.read(base)
    entries = [(info.name, info.dtype, info.shape) for info in model.tensors]
    with atomic_file(out) as file, flushing(file.fileno()):
        writer = TensorPlaces(file.fileno(), entries, model.metadata)
        each_piece(model.tensors, lambda stack: writer.writing(make(stack)), most_threads=most_threads)


class TensorPlaces:
    """A safetensors file that is begun: its header, and a place for each tensor's pieces."""

    def __init__(
        self,
        descriptor: int,
        entries: Sequence[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        self._descriptor = descriptor
        header = encode_header(list(entries), metadata)
        os.pwrite(descriptor, header, 0)
        self._places, end = {}, len(header)
        for name, dtype, shape in entries:
            self._places[name] = end
            end += math.prod(shape) * ITEM_BYTES[dtype]
        os.ftruncate(descriptor, end)

    def write(self, name: str, offset_bytes: int, data: Raw) -> None:
        """Put bytes where they belong in a tensor."""
        place, done = self._places[name] + offset_bytes, 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:].data, place + done)

    def writing(self, bytes_of: Callable[[Piece], Raw]) -> Callable[[Piece], None]:
        """Work that writes what is made of each piece."""

        def work(piece: Piece) -> None:
            data = bytes_of(piece)
            self.write(piece.info.name, piece.start * (len(data) // max(piece.count, 1)), data)

        return work


class NextModel:
    """Pieces of the next model in its own types, beside the present one; for one thread."""

    def __init__(self, chain: Chain, base: TensorFile) -> None:
        self._chain, self._base = chain, base
        self._raw = np.empty(PIECE_VALUES * max(ITEM_BYTES.values()), np.uint8)
        self._other = np.empty(0)

    def carried(self, piece: Piece) -> Raw:
        """The present model's bytes; valid until the next call."""
        raw = self._raw[: piece.count * ITEM_BYTES[piece.info.dtype]]
        self._base.read(piece.info.name, piece.start_bytes, raw.data)
        return raw

    def rounded(self, piece: Piece, values: Values) -> Raw:
        """Values, or changes where updates tell these, as bytes; both arguments are used up.

        Raises:
            BadTensor: a value of the next model is not finite.
        """
        info = piece.info
        raw = self._raw[: piece.count * ITEM_BYTES[info.dtype]]
        if self._chain.tells_changes(info):
            if len(self._other) < piece.count:
                self._other = np.empty(PIECE_VALUES)
            self.present(piece, self._other[: piece.count])
            np.add(values, self._other[: piece.count], out=values)
        with np.errstate(over="ignore"):  # told below
            encode(values, info.dtype, raw)
        if not np.isfinite(values).all() or first_not_finite(raw, info.dtype) is not None:
            raise BadTensor(
                f"the next model's tensor {info.name} is not finite in {info.dtype}: some update holds NaN "
                "or infinity, or they are too far from their model"
            )
        return raw

    def present(self, piece: Piece, values: NDArray[Any]) -> None:
        """Fill ``values`` with the present model's."""
        decode(self.carried(piece), piece.info.dtype, values)
