"""A chain of codecs at work: which parts a tensor becomes, and how large they may be."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedloom_common.codecs.frames import Frames, bound_bytes
from fedloom_common.codecs.spec import AnyStage, Bf16, Fp16, Fp32, Int4, Int8, TopK, Zstd, uses_feedback
from fedloom_common.codecs.topk import kept
from fedloom_common.codecs.values import PIECE_VALUES, Float, Part, ValueCodec
from fedloom_common.codecs.values import Int4 as Int4Values
from fedloom_common.codecs.values import Int8 as Int8Values
from fedloom_common.errors import BadTensor
from fedloom_common.tensors import ITEM_BYTES, Manifest, TensorInfo, encode_header

CHAIN_KEY, BASE_KEY = "fedloom.codec", "fedloom.base"
HEADER_SLACK_BYTES = 1 << 16  # another client's header may hold spaces and metadata that ours does not

_CODED = frozenset({"F32", "F16", "BF16"})


class Entry(NamedTuple):
    """A tensor of an encoded file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    may_be_shorter: bool = False
    """Whether the shape is only the largest: that of compressed bytes."""

    @property
    def size_bytes(self) -> int:
        """The most bytes that it takes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Scratch:
    """Memory for one piece, used again and again so that it stays in the cache."""

    def __init__(self) -> None:
        self.values = np.empty(PIECE_VALUES, np.float32)
        self.other = np.empty(PIECE_VALUES, np.float32)
        self.raw = np.empty(PIECE_VALUES * max(ITEM_BYTES.values()), np.uint8)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parts of one coded tensor in an encoded file."""

    info: TensorInfo
    """The tensor of the model."""
    values: int
    """Values of the tensor."""
    items: int
    """Values that are told: all, or the k that top-k keeps."""
    parts: tuple[Part, ...]
    """In the order in which a piece's bytes are handed around."""
    is_sparse: bool
    is_framed: bool

    @property
    def pieces(self) -> int:
        """Pieces that the tensor's values come in."""
        return -(-self.values // PIECE_VALUES)

    @property
    def item_pieces(self) -> int:
        """Pieces that the items come in."""
        return -(-self.items // PIECE_VALUES)

    @property
    def frames(self) -> int:
        """zstd frames in a piece of items."""
        return sum(part.planes for part in self.parts)

    def piece_values(self, piece: int) -> int:
        """Values in one of the tensor's pieces."""
        return min(PIECE_VALUES, self.values - piece * PIECE_VALUES)

    def piece_items(self, piece: int) -> int:
        """Items in one of their pieces."""
        return min(PIECE_VALUES, self.items - piece * PIECE_VALUES)

    def payload_bound_bytes(self) -> int:
        """The largest that all zstd frames together can be."""
        whole = self.item_pieces - 1
        return whole * self._frames_bytes(PIECE_VALUES) + self._frames_bytes(self.piece_items(whole))

    def entries(self) -> list[Entry]:
        """What the file holds for the tensor."""
        entries = [Entry(self.name(".count"), "U32", (self.pieces,))] if self.is_sparse else []
        if self.is_framed:
            entries.append(Entry(self.name(".frames"), "U32", (self.item_pieces * self.frames,)))
            payload = Entry(self.name(".zstd"), "U8", (self.payload_bound_bytes(),), may_be_shorter=True)
            return [*entries, payload]
        return entries + [Entry(self.name(part.suffix), part.dtype, self._shape(part)) for part in self.parts]

    def name(self, suffix: str) -> str:
        """The name of a part."""
        return self.info.name + suffix

    def _shape(self, part: Part) -> tuple[int, ...]:
        has_shape = part.values == 1 and not self.is_sparse
        return self.info.shape if has_shape else (part.count(self.items),)

    def _frames_bytes(self, items: int) -> int:
        return sum(part.planes * bound_bytes(part.size_bytes(items) // part.planes) for part in self.parts)


class Chain:
    """A chain of codecs. Its scratch memory is its own, so each thread needs its own chain.

    Memory: under 2 MiB.
    """

    def __init__(self, stages: Sequence[AnyStage]) -> None:
        self.name = "+".join(stage.name for stage in stages)
        self._stages = stages
        self._topk = next((stage for stage in stages if isinstance(stage, TopK)), None)
        self.frames = Frames() if any(isinstance(stage, Zstd) for stage in stages) else None
        self.values = _value_codec(stages)
        self.scratch = Scratch()

    @property
    def is_exact(self) -> bool:
        """Whether what is decoded is what was encoded, bit by bit."""
        return all(isinstance(stage, Fp32 | Zstd) for stage in self._stages)

    @property
    def is_as_is(self) -> bool:
        """Whether an encoded file is the model itself."""
        return self.is_exact and self.frames is None

    @property
    def is_sparse(self) -> bool:
        """Whether only some of a tensor's values are told."""
        return self._topk is not None

    @property
    def uses_feedback(self) -> bool:
        """Whether an encoder wants error feedback."""
        return any(uses_feedback(stage) for stage in self._stages)

    def is_coded(self, info: TensorInfo) -> bool:
        """Whether a tensor is coded; all others are carried as they are."""
        return not self.is_as_is and info.dtype in _CODED and bool(info.shape) and info.size_bytes > 0

    def tells_changes(self, info: TensorInfo) -> bool:
        """Whether a tensor is told as a change against the base, in fp32 precision."""
        return not self.is_exact and self.is_coded(info)

    def layout(self, info: TensorInfo) -> Layout:
        """The parts of a coded tensor."""
        values = info.size_bytes // ITEM_BYTES[info.dtype]
        items = kept(values, self._topk.fraction) if self._topk else values
        return Layout(
            info=info,
            values=values,
            items=items,
            parts=self._parts(info),
            is_sparse=self.is_sparse,
            is_framed=self.frames is not None,
        )

    def entries(self, model: Manifest) -> list[Entry]:
        """All tensors of an encoded file.

        Raises:
            BadTensor: a part would have the name of another tensor.
        """
        entries: list[Entry] = []
        for info in model.tensors:
            coded = self.is_coded(info)
            entries += self.layout(info).entries() if coded else [Entry(info.name, info.dtype, info.shape)]
        names: set[str] = set()
        for entry in entries:
            if entry.name in names:
                raise BadTensor(
                    f"codec {self.name} would give two tensors the name {entry.name}: use another codec"
                )
            names.add(entry.name)
        return entries

    def limit_bytes(self, model: Manifest) -> int:
        """The largest that an encoded file of this model can be, for a cap on uploads."""
        entries = self.entries(model)
        header = encode_header([entry[:3] for entry in entries], self.metadata("blake3:" + "0" * 64))
        return 2 * len(header) + HEADER_SLACK_BYTES + sum(entry.size_bytes for entry in entries)

    def metadata(self, base_digest: str) -> dict[str, str]:
        """What an encoded file says of itself."""
        return {CHAIN_KEY: json.dumps(self._described())} | ({} if self.is_as_is else {BASE_KEY: base_digest})

    def require_metadata(self, metadata: dict[str, str], base_digest: str) -> None:
        """Check that a file is encoded by this chain, against this base.

        Raises:
            BadTensor: tells what the file says, and what was wanted.
        """
        came, base = metadata.get(CHAIN_KEY), metadata.get(BASE_KEY)
        if not (came is None and self.is_as_is) and _parsed(came) != self._described():
            raise BadTensor(f"the file's codec is {_told(came)}, wanted {json.dumps(self._described())}")
        if not self.is_as_is and base != base_digest:
            raise BadTensor(f"the file's base model is {_told(base)}, wanted {base_digest}")

    def _described(self) -> list[Any]:
        return [stage.model_dump(mode="json", exclude={"error_feedback"}) for stage in self._stages]

    def _parts(self, info: TensorInfo) -> tuple[Part, ...]:
        if self.is_exact:
            return (Part(suffix="", dtype=info.dtype, planes=ITEM_BYTES[info.dtype]),)
        if not self.is_sparse:
            return self.values.parts
        named = [Part(**{**vars(part), "suffix": part.suffix or ".value"}) for part in self.values.parts]
        return (Part(suffix=".gap", dtype="U16", planes=2), *named)


def _value_codec(stages: Sequence[AnyStage]) -> ValueCodec:
    for stage in stages:
        match stage:
            case Bf16():
                return Float("BF16")
            case Fp16():
                return Float("F16")
            case Int8():
                return Int8Values(stage.block)
            case Int4():
                return Int4Values(stage.block)
            case _:
                pass
    return Float("F32")


def _told(text: str | None) -> str:
    """A peer's text, of a length that fits a message."""
    return "not told" if text is None else text if len(text) <= 200 else f"{text[:200]}…"


def _parsed(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
