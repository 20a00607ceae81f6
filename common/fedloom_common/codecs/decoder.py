"""Decoding: an encoded file's values in pieces, and every check that a peer's file must pass."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.checks import in_own_type, naming, require_finite
from fedloom_common.codecs.readers import TensorReader, tensor_reader
from fedloom_common.codecs.values import PIECE_VALUES, Raw
from fedloom_common.errors import BadTensor
from fedloom_common.files import atomic_file
from fedloom_common.floats import decode
from fedloom_common.tensorfiles import TensorFile, TensorSource
from fedloom_common.tensors import ITEM_BYTES, TensorInfo, encode_header

# Changes below these cannot carry a finite value past the largest one of its type: they are less
# than half of that one's last place (F16: an eighth, since the sum is rounded to fp32 before).
_HARMLESS = {"F32": 2.0**103, "BF16": 2.0**103, "F16": 4.0}

AnyValues = NDArray[np.floating[Any]]


class Decoder:
    """An encoded file, open for reading in pieces against its base model.

    Decoders that one thread reads in turn should share a chain: its scratch memory stays in the cache.

    Memory: the header; and of the tensor being read its parts' pieces and a few numbers for each of its
    pieces: under 2 MiB for tensors of up to a billion values, whatever the codec.
    """

    def __init__(self, path: Path, chain: Chain, *, base: TensorSource, base_digest: str) -> None:
        """Open a file and check its header; its values are for :meth:`check`.

        Raises:
            BadTensor: it is not safetensors, has another codec or base, or its tensors are not those that
                the codec makes of the base's; all sizes come from the base model, never from the file.
        """
        self._chain, self._base = chain, base
        self._model = {info.name: info for info in base.manifest.tensors}
        self._name = ""
        self._reader: TensorReader | None = None
        self._file = TensorFile(path)
        try:
            manifest = self._file.manifest
            self._infos = {info.name: info for info in manifest.tensors}
            chain.require_metadata(manifest.metadata, base_digest)
            _require_entries(chain, base, self._infos)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def has_change(self, name: str) -> bool:
        """Whether a tensor is told as a change against the base, for :meth:`read_change`."""
        return self._chain.tells_changes(self._model[name])

    def read(self, name: str, start: int, values: AnyValues) -> None:
        """Fill ``values`` with a float tensor's values from ``start`` on; coded ones have fp32 precision.

        ``start`` is a multiple of ``PIECE_VALUES``, and so is the length, unless it reaches the tensor's
        end. Pieces may be read in any order; in their own it is fastest.

        Raises:
            BadTensor: the file did not pass :meth:`check` and this piece would not.
        """
        info = self._model[name]
        with naming(info):
            for piece, part in _pieces(info, start, values):
                if self.has_change(name):
                    self._read_changed(info, piece, part)
                else:
                    decode(self.read_bytes(name, piece), info.dtype, part)

    def read_change(self, name: str, start: int, values: AnyValues) -> None:
        """Fill ``values`` with a tensor's change alone, as :meth:`read` does: the base model is not read.

        A mean of changes, with the base added once, costs about half of a mean of values.

        Raises:
            BadTensor: the file did not pass :meth:`check` and this piece would not.
        """
        info = self._model[name]
        with naming(info):
            for piece, part in _pieces(info, start, values):
                change = self._chain.scratch.values[: len(part)]
                self._open(info).change(piece, change)
                np.copyto(part, change)

    def read_bytes(self, name: str, piece: int) -> Raw:
        """A piece of a tensor without change, in the model's own type; valid until the next call."""
        info = self._model[name]
        item = ITEM_BYTES[info.dtype]
        place = piece * PIECE_VALUES * item
        raw = self._chain.scratch.raw[: min(PIECE_VALUES * item, info.size_bytes - place)]
        if not self._chain.is_coded(info):
            self._file.read(name, place, raw.data)
            return raw
        self._base.read(name, place, raw.data)
        bits = raw.view(f"<u{item}")
        np.add(bits, self._open(info).bits(piece).view(f"<u{item}"), out=bits)
        return raw

    def check(self) -> None:
        """Check every value that the file tells; where nothing is extraordinary none needs to be decoded.

        Raises:
            BadTensor: names the tensor: a value of the decoded model would not be finite or within its
                type's range, or the tensor's parts are not what the codec makes.
        """
        for info in self._model.values():
            with naming(info):
                for piece in range(-(-info.size_bytes // (PIECE_VALUES * ITEM_BYTES[info.dtype]))):
                    if self.has_change(info.name):
                        self._check_change(info, piece)
                    elif info.is_float:
                        require_finite(self.read_bytes(info.name, piece), info, piece)

    def _check_change(self, info: TensorInfo, piece: int) -> None:
        if self._open(info).limit(piece) < _HARMLESS[info.dtype]:
            return
        values = np.empty(self._chain.layout(info).piece_values(piece), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # told by the check below instead
            self._read_changed(info, piece, values)
        in_own_type(values, info, piece)

    def _read_changed(self, info: TensorInfo, piece: int, values: AnyValues) -> None:
        count, scratch, item = len(values), self._chain.scratch, ITEM_BYTES[info.dtype]
        change, base, raw = scratch.values[:count], scratch.other[:count], scratch.raw[: count * item]
        self._open(info).change(piece, change)
        self._base.read(info.name, piece * PIECE_VALUES * item, raw.data)
        decode(raw, info.dtype, base)
        np.add(base, change, out=change)  # in fp32 wherever it is done, so that all get the same bits
        np.copyto(values, change)

    def _open(self, info: TensorInfo) -> TensorReader:
        if self._reader is None or self._name != info.name:
            layout = self._chain.layout(info)
            self._reader = tensor_reader(self._chain, layout, self._infos, self._file.descriptor)
            self._name = info.name
        return self._reader


def decode_model(encoded: Path, chain: Chain, *, base: TensorSource, base_digest: str, out: Path) -> None:
    """Write the model that an encoded file and its base make: the same bytes wherever it is done.

    Names, types, order and metadata are the base's.

    Memory: about 3 MiB, whatever the size of the model.

    Raises:
        BadTensor: the file fails a check of :class:`Decoder`.
    """
    model, values = base.manifest, np.empty(PIECE_VALUES, np.float32)
    entries = [(info.name, info.dtype, info.shape) for info in model.tensors]
    with Decoder(encoded, chain, base=base, base_digest=base_digest) as decoder, atomic_file(out) as file:
        decoder.check()
        file.write(encode_header(entries, model.metadata))
        for info in model.tensors:
            count = info.size_bytes // ITEM_BYTES[info.dtype]
            for start in range(0, count, PIECE_VALUES):
                piece = start // PIECE_VALUES
                if decoder.has_change(info.name):
                    decoder.read(info.name, start, values[: count - start])
                    file.write(in_own_type(values[: count - start], info, piece).data)
                else:
                    file.write(decoder.read_bytes(info.name, piece).data)


def _pieces(info: TensorInfo, start: int, values: AnyValues) -> list[tuple[int, AnyValues]]:
    """The pieces of a tensor, and which part of ``values`` each fills."""
    left = info.size_bytes // ITEM_BYTES[info.dtype] - start
    assert start % PIECE_VALUES == 0
    assert len(values) == left or (len(values) < left and len(values) % PIECE_VALUES == 0)
    places = range(0, len(values), PIECE_VALUES)
    return [((start + place) // PIECE_VALUES, values[place : place + PIECE_VALUES]) for place in places]


def _require_entries(chain: Chain, base: TensorSource, infos: Mapping[str, TensorInfo]) -> None:
    """Check that a file's tensors are those that a chain makes of the model's."""
    wanted = chain.entries(base.manifest)
    for name, dtype, shape, may_be_shorter in wanted:
        came = infos.get(name)
        if came is None:
            raise BadTensor(f"tensor {name} is missing: codec {chain.name} makes it")
        if came.dtype != dtype:
            raise BadTensor(f"tensor {name} has dtype {came.dtype}, wanted {dtype}")
        shorter = may_be_shorter and len(came.shape) == 1 and came.shape <= shape
        if came.shape != shape and not shorter:
            raise BadTensor(f"tensor {name} has shape {list(came.shape)}, wanted {list(shape)}")
    if len(infos) > len(wanted):
        surplus = min(set(infos) - {entry.name for entry in wanted})
        raise BadTensor(f"tensor {surplus} is not one that codec {chain.name} makes of the model")
