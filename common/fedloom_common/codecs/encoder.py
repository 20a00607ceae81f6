"""Encoding: a trained model and the base that it started from become one file, a piece at a time."""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from fedloom_common.codecs.chain import Chain, Layout
from fedloom_common.codecs.checks import naming, refuse, require_finite
from fedloom_common.codecs.feedback import Feedback, Residual
from fedloom_common.codecs.readers import tensor_reader
from fedloom_common.codecs.storage import Buffers, OutputFile, parts_writer
from fedloom_common.codecs.topk import Picker, find_threshold, gaps_of
from fedloom_common.codecs.values import PIECE_VALUES, Raw, Values
from fedloom_common.files import atomic_file
from fedloom_common.floats import decode, first_not_finite
from fedloom_common.tensorfiles import TensorSource
from fedloom_common.tensors import ITEM_BYTES, TensorInfo

HELD_VALUES = 1 << 24
"""Top-k goes through a tensor three times: up to so many values stay in memory, more are read anew."""


def encode_model(
    chain: Chain,
    *,
    trained: TensorSource,
    base: TensorSource,
    base_digest: str,
    out: Path,
    feedback: Feedback | None = None,
) -> None:
    """Write ``trained`` to ``out``, encoded; the file appears whole or not at all, and after its residual.

    Without ``feedback``, what lossy stages leave out is lost.

    Memory: about 3 MiB, whatever the size of the model; with top-k 64 MiB more.

    Raises:
        BadTensor: the two models' tensors differ, a value or a change is not finite, or the codec
            has no code for it.
    """
    model = base.manifest
    model.require_same_tensors(trained.manifest)
    coded = [info for info in model.tensors if chain.is_coded(info)]
    with (
        atomic_file(out) as file,
        feedback.prepare(coded) if feedback else nullcontext() as residual,
    ):
        written = OutputFile(file, chain.entries(model), chain.metadata(base_digest))
        changes = _Changes(chain, trained, base, residual)
        encoder = _Encoder(chain, changes, written, file)
        for info in model.tensors:
            with naming(info):
                if chain.is_coded(info):
                    encoder.encode(chain.layout(info), residual)
                else:
                    encoder.carry(info)
        written.finish()


class _Changes:
    """trained − base, plus what earlier updates left out, a piece at a time."""

    def __init__(
        self, chain: Chain, trained: TensorSource, base: TensorSource, residual: Residual | None
    ) -> None:
        self._scratch = chain.scratch
        self._trained, self._base, self._residual = trained, base, residual

    def piece(self, layout: Layout, piece: int) -> Values:
        """One piece of a tensor's change; valid until the next call."""
        info, count = layout.info, layout.piece_values(piece)
        values, other = self._scratch.values[:count], self._scratch.other[:count]
        with np.errstate(over="ignore", invalid="ignore"):  # told by the check below instead
            self._load(self._trained, info, piece, values)
            self._load(self._base, info, piece, other)
            np.subtract(values, other, out=values)
            if self._residual is not None:
                self._residual.read(info, piece, other)
                np.add(values, other, out=values)
        found = first_not_finite(values.view(np.uint8), "F32")
        if found is not None:
            self._load(self._trained, info, piece, other)
            came = f"holds {other[found]}" if not np.isfinite(other[found]) else f"changes by {values[found]}"
            refuse(info, piece, found, came)
        return values

    def replayable(self, layout: Layout) -> Callable[[], Iterator[Values]]:
        """All pieces of a tensor's change, as often as they are asked for."""
        if layout.values > HELD_VALUES:
            return lambda: (self.piece(layout, piece) for piece in range(layout.pieces))
        held = np.empty(layout.values, np.float32)
        pieces = np.split(held, range(PIECE_VALUES, layout.values, PIECE_VALUES))
        for piece, values in enumerate(pieces):
            np.copyto(values, self.piece(layout, piece))
        return lambda: iter(pieces)

    def bits(self, layout: Layout, piece: int, raw: Raw) -> None:
        """Write the difference of the models' bit patterns, as integers, to ``raw``: nothing is rounded."""
        info, bits = layout.info, f"<u{ITEM_BYTES[layout.info.dtype]}"
        self.own(info, piece, raw)
        other = self._scratch.raw[: len(raw)]
        self._base.read(info.name, _place_bytes(info, piece), other.data)
        np.subtract(raw.view(bits), other.view(bits), out=raw.view(bits))

    def own(self, info: TensorInfo, piece: int, raw: Raw) -> None:
        """Fill ``raw`` with a piece of the trained model's own bytes."""
        self._trained.read(info.name, _place_bytes(info, piece), raw.data)
        if info.is_float:
            require_finite(raw, info, piece)

    def _load(self, source: TensorSource, info: TensorInfo, piece: int, values: Values) -> None:
        if info.dtype == "F32":
            source.read(info.name, _place_bytes(info, piece), values.view(np.uint8).data)
            return
        raw = self._scratch.raw[: len(values) * ITEM_BYTES[info.dtype]]
        source.read(info.name, _place_bytes(info, piece), raw.data)
        decode(raw, info.dtype, values)


class _Encoder:
    """Writes one tensor after the other."""

    def __init__(self, chain: Chain, changes: _Changes, out: OutputFile, file: IO[bytes]) -> None:
        self._chain, self._changes, self._out, self._file = chain, changes, out, file
        self._told = np.empty(PIECE_VALUES, np.float32)

    def carry(self, info: TensorInfo) -> None:
        """Write a tensor as it is."""
        buffer = np.empty(min(info.size_bytes, _place_bytes(info, 1)), np.uint8)
        for piece, place in enumerate(range(0, info.size_bytes, _place_bytes(info, 1))):
            raw = buffer[: info.size_bytes - place]
            self._changes.own(info, piece, raw)
            self._out.write(info.name, place, raw.data)

    def encode(self, layout: Layout, residual: Residual | None) -> None:
        """Write a tensor's parts, and keep what they leave out."""
        if layout.is_sparse:
            self._encode_sparse(layout)
            self._keep_sparse(layout, residual)
        else:
            self._encode_dense(layout, residual)

    def _encode_dense(self, layout: Layout, residual: Residual | None) -> None:
        buffers, writer = Buffers(layout), parts_writer(self._chain, layout, self._out)
        for piece in range(layout.pieces):
            raws = buffers.of(layout.piece_items(piece))
            if self._chain.is_exact:
                self._changes.bits(layout, piece, raws[0])
            else:
                change = self._changes.piece(layout, piece)
                self._chain.values.encode(change, raws)
                if residual is not None:
                    told = self._told[: len(change)]
                    self._chain.values.decode(raws, told)
                    residual.write(layout.info, piece, np.subtract(change, told, out=told))
            writer.write(piece, raws)
        writer.finish()

    def _encode_sparse(self, layout: Layout) -> None:
        pieces = self._changes.replayable(layout)
        threshold = find_threshold(pieces, layout.items)
        counts = np.empty(layout.pieces, "<u4")
        picker, items = Picker(threshold), _Items(self._chain, layout, self._out)
        for piece, values in enumerate(pieces()):
            indices = picker.pick(values)
            counts[piece] = len(indices)
            items.add(gaps_of(indices), values[indices])
        items.finish()
        self._out.write(layout.name(".count"), 0, counts.view(np.uint8).data)

    def _keep_sparse(self, layout: Layout, residual: Residual | None) -> None:
        """Keep the change less what a decoder makes of the parts, once they are all written."""
        if residual is None:
            return
        descriptor = os.open(self._file.name, os.O_RDONLY)  # the file itself is open for writing alone
        try:
            reader = tensor_reader(self._chain, layout, self._out.infos, descriptor)
            for piece in range(layout.pieces):
                change = self._changes.piece(layout, piece)
                told = self._told[: len(change)]
                reader.change(piece, told)
                residual.write(layout.info, piece, np.subtract(change, told, out=told))
        finally:
            os.close(descriptor)


class _Items:
    """Gathers kept values into whole pieces, and writes them."""

    def __init__(self, chain: Chain, layout: Layout, out: OutputFile) -> None:
        self._values_codec, self._layout = chain.values, layout
        self._buffers, self._writer = Buffers(layout), parts_writer(chain, layout, out)
        self._gaps = np.empty(layout.piece_items(0), "<u2")
        self._values = np.empty(layout.piece_items(0), np.float32)
        self._held, self._piece = 0, 0

    def add(self, gaps: NDArray[np.uint16], values: Values) -> None:
        """Take the kept values of one piece of the tensor."""
        while len(values):
            room = slice(self._held, self._held + len(values))
            taken = len(self._values[room])
            self._gaps[room], self._values[room] = gaps[:taken], values[:taken]
            self._held += taken
            gaps, values = gaps[taken:], values[taken:]
            if self._held == len(self._values):
                self._write()

    def finish(self) -> None:
        """Write what is held."""
        if self._held:
            self._write()
        self._writer.finish()

    def _write(self) -> None:
        raws = self._buffers.of(self._held)
        np.copyto(raws[0].view("<u2"), self._gaps[: self._held])
        self._values_codec.encode(self._values[: self._held], raws[1:])
        self._writer.write(self._piece, raws)
        self._held, self._piece = 0, self._piece + 1


def _place_bytes(info: TensorInfo, piece: int) -> int:
    """Where a piece begins within a tensor, in the model's own type."""
    return piece * PIECE_VALUES * ITEM_BYTES[info.dtype]
