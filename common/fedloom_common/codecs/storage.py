"""Where the parts of coded tensors lie in a file, as they are or in zstd frames."""

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import IO, Protocol

import numpy as np

from fedloom_common.codecs.chain import Chain, Entry, Layout
from fedloom_common.codecs.frames import Frames, bound_bytes
from fedloom_common.codecs.values import PIECE_VALUES, Part, Raw
from fedloom_common.errors import BadTensor
from fedloom_common.tensors import ITEM_BYTES, TensorInfo, encode_header, read_into


class OutputFile:
    """A safetensors file whose compressed tensors have sizes that show only as they are written.

    All others have their places from the start, those of wide elements first, so that each is
    aligned as readers of other makes want it; compressed bytes follow. At the front is room for
    the largest header that can be needed: the format lets a header end in spaces.
    """

    def __init__(self, file: IO[bytes], entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        self._descriptor, self._metadata = file.fileno(), metadata
        placed = sorted((entry for entry in entries if not entry.may_be_shorter), key=_narrowness)
        compressed = [entry for entry in entries if entry.may_be_shorter]
        header = encode_header([entry[:3] for entry in placed + compressed], metadata)
        self._header_bytes = self._end = len(header)
        self.infos: dict[str, TensorInfo] = {}
        """The tensors that have their places."""
        for entry in placed:
            self._add(entry.name, entry.dtype, entry.shape, self._end)
            self._end += entry.size_bytes

    def write(self, name: str, offset_bytes: int, data: memoryview | bytes) -> None:
        """Write a part of a tensor that has its place."""
        self._write(self.infos[name].start_bytes + offset_bytes, data)

    def append(self, data: memoryview | bytes) -> None:
        """Write further compressed bytes."""
        self._write(self._end, data)
        self._end += len(data)

    def close_compressed(self, name: str, size_bytes: int) -> None:
        """Make the bytes that were appended last a tensor."""
        self._add(name, "U8", (size_bytes,), self._end - size_bytes)

    def finish(self) -> None:
        """Write the header. Nothing may be written afterwards."""
        entries = [(info.name, info.dtype, info.shape) for info in self.infos.values()]
        text = encode_header(entries, self._metadata)[8:].ljust(self._header_bytes - 8)
        self._write(0, struct.pack("<Q", len(text)) + text)
        os.ftruncate(self._descriptor, self._end)  # what was never written is zeros

    def _add(self, name: str, dtype: str, shape: tuple[int, ...], start_bytes: int) -> None:
        size = math.prod(shape) * ITEM_BYTES[dtype]
        self.infos[name] = TensorInfo(
            name=name, dtype=dtype, shape=shape, start_bytes=start_bytes, size_bytes=size
        )

    def _write(self, place_bytes: int, data: memoryview | bytes) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], place_bytes + done)


def _narrowness(entry: Entry) -> int:
    return -ITEM_BYTES[entry.dtype]


class Buffers:
    """Memory for the parts of one piece of a tensor's items."""

    def __init__(self, layout: Layout) -> None:
        self._parts = layout.parts
        largest = layout.piece_items(0)
        self._raws = [np.empty(part.size_bytes(largest), np.uint8) for part in layout.parts]

    def of(self, items: int) -> list[Raw]:
        """An array of bytes for each part."""
        return [raw[: part.size_bytes(items)] for part, raw in zip(self._parts, self._raws, strict=True)]


class PartsWriter(Protocol):
    """Takes the items of one tensor, piece after piece."""

    def write(self, piece: int, raws: Sequence[Raw]) -> None:
        """Take the next piece."""

    def finish(self) -> None:
        """Complete the tensor."""


class PartsReader(Protocol):
    """Gives the items of one tensor by piece, in any order."""

    def read(self, piece: int) -> list[Raw]:
        """The bytes of each part; valid until the next call."""


def parts_writer(chain: Chain, layout: Layout, out: OutputFile) -> PartsWriter:
    """A writer for a tensor's parts."""
    return _PlainWriter(layout, out) if chain.frames is None else _FrameWriter(layout, out, chain.frames)


def parts_reader(
    chain: Chain, layout: Layout, infos: Mapping[str, TensorInfo], descriptor: int
) -> PartsReader:
    """A reader of a tensor's parts, which lie in an open file as ``infos`` tells.

    Raises:
        BadTensor: the sizes of the tensor's frames do not add up.
    """
    if chain.frames is None:
        return _PlainReader(layout, infos, descriptor)
    return _FrameReader(layout, infos, descriptor, chain.frames)


class _PlainWriter:
    def __init__(self, layout: Layout, out: OutputFile) -> None:
        self._layout, self._out = layout, out

    def write(self, piece: int, raws: Sequence[Raw]) -> None:
        for part, raw in zip(self._layout.parts, raws, strict=True):
            place = part.size_bytes(piece * PIECE_VALUES)
            self._out.write(self._layout.name(part.suffix), place, raw.data)

    def finish(self) -> None:
        pass


class _PlainReader:
    def __init__(self, layout: Layout, infos: Mapping[str, TensorInfo], descriptor: int) -> None:
        self._layout, self._descriptor, self._buffers = layout, descriptor, Buffers(layout)
        self._starts = [infos[layout.name(part.suffix)].start_bytes for part in layout.parts]

    def read(self, piece: int) -> list[Raw]:
        raws = self._buffers.of(self._layout.piece_items(piece))
        for part, start, raw in zip(self._layout.parts, self._starts, raws, strict=True):
            read_into(self._descriptor, raw.data, start + part.size_bytes(piece * PIECE_VALUES))
        return raws


class _FrameWriter:
    def __init__(self, layout: Layout, out: OutputFile, frames: Frames) -> None:
        self._layout, self._out, self._frames = layout, out, frames
        self._sizes: list[int] = []

    def write(self, piece: int, raws: Sequence[Raw]) -> None:
        del piece  # frames follow one another
        for part, raw in zip(self._layout.parts, raws, strict=True):
            for frame in self._frames.compress(raw, part.planes):
                self._out.append(frame)
                self._sizes.append(len(frame))

    def finish(self) -> None:
        table = np.asarray(self._sizes, "<u4")
        self._out.write(self._layout.name(".frames"), 0, table.view(np.uint8).data)
        self._out.close_compressed(self._layout.name(".zstd"), sum(self._sizes))


class _FrameReader:
    def __init__(
        self, layout: Layout, infos: Mapping[str, TensorInfo], descriptor: int, frames: Frames
    ) -> None:
        self._layout, self._descriptor, self._frames = layout, descriptor, frames
        self._buffers = Buffers(layout)
        sizes, payload = infos[layout.name(".frames")], infos[layout.name(".zstd")]
        table = np.empty(sizes.shape, "<u4")
        read_into(descriptor, table.view(np.uint8).data, sizes.start_bytes)
        ends = np.cumsum(table, dtype=np.int64)
        if ends[-1] != payload.size_bytes:
            raise BadTensor(f"its frames have {ends[-1]} bytes together, the tensor {payload.size_bytes}")
        self._places = payload.start_bytes + np.concatenate([[0], ends])

    def read(self, piece: int) -> list[Raw]:
        raws = self._buffers.of(self._layout.piece_items(piece))
        planes = [len(raw) // part.planes for part, raw in self._with_parts(raws) for _ in range(part.planes)]
        frames = self._frames_of(piece, planes)
        for part, raw in self._with_parts(raws):
            self._frames.decompress(frames[: part.planes], part.planes, raw)
            frames = frames[part.planes :]
        return raws

    def _frames_of(self, piece: int, planes_bytes: Sequence[int]) -> list[memoryview]:
        """The frames of a piece, none of them larger than its plane can become."""
        first = piece * self._layout.frames
        places = self._places[first : first + self._layout.frames + 1].tolist()
        for size, plane_bytes in zip(np.diff(places).tolist(), planes_bytes, strict=True):
            if size > bound_bytes(plane_bytes):
                raise BadTensor(
                    f"a zstd frame has {size} bytes, too many for the {plane_bytes} that it tells"
                )
        held = np.empty(places[-1] - places[0], np.uint8).data
        read_into(self._descriptor, held, places[0])
        starts = [place - places[0] for place in places]
        return [held[start:end] for start, end in pairwise(starts)]

    def _with_parts(self, raws: Sequence[Raw]) -> Iterator[tuple[Part, Raw]]:
        return zip(self._layout.parts, raws, strict=True)
