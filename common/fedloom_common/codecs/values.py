"""Value codecs: a piece of fp32 values as bytes, and back.

A codec's scratch memory is its own, so each thread needs its own codecs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom_common.errors import BadTensor
from fedloom_common.floats import decode, encode, magnitude
from fedloom_common.tensors import ITEM_BYTES

PIECE_VALUES = 1 << 16
"""Values that are coded at a time: a piece, its base and their scratch memory fill a core's L2 cache."""

Raw = NDArray[np.uint8]
Values = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the tensors that a coded tensor becomes."""

    suffix: str
    """Added to the tensor's name; "" for none."""
    dtype: str
    values: int = 1
    """Values that share one element."""
    planes: int = 1
    """Byte planes that compression sorts the elements into."""

    def count(self, values: int) -> int:
        """Elements for so many values; every piece but the last is a multiple of ``values``."""
        return -(-values // self.values)

    def size_bytes(self, values: int) -> int:
        """Bytes for so many values."""
        return self.count(values) * ITEM_BYTES[self.dtype]


class ValueCodec(Protocol):
    """Turns up to ``PIECE_VALUES`` finite fp32 values into one array of bytes for each part, and back."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the arrays hold."""

    def encode(self, values: Values, raws: Sequence[Raw]) -> None:
        """Write ``values`` to ``raws``.

        Raises:
            BadTensor: a value has no code; the message names its index in the piece.
        """

    def decode(self, raws: Sequence[Raw], values: Values) -> None:
        """Write the values that ``raws`` hold to ``values``."""

    def limit(self, raws: Sequence[Raw]) -> float:
        """A magnitude that none of the values exceeds: much faster than to decode them.

        Raises:
            BadTensor: some value is not finite, or a scale not a positive number.
        """


class Float:
    """Values rounded to a float type: exact for F32.

    Error: at most 2⁻⁸ of the value for BF16 (2⁻¹³⁴ for the smallest), 2⁻¹¹ for F16 (2⁻²⁵ below 6e-5).
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self.parts = (Part(suffix="", dtype=dtype, planes=ITEM_BYTES[dtype]),)

    def encode(self, values: Values, raws: Sequence[Raw]) -> None:
        with np.errstate(over="ignore"):  # told by the check below instead
            encode(values, self._dtype, raws[0])
        if not np.isfinite(magnitude(raws[0], self._dtype)):
            index = int(np.argmax(np.abs(values)))
            raise BadTensor(
                f"the change at {index} is {values[index]}, beyond {self._dtype}'s range: "
                "use a codec without one, such as int8"
            )

    def decode(self, raws: Sequence[Raw], values: Values) -> None:
        decode(raws[0], self._dtype, values)

    def limit(self, raws: Sequence[Raw]) -> float:
        limit = magnitude(raws[0], self._dtype)
        if not np.isfinite(limit):
            raise BadTensor(f"a value is {limit}, wanted finite values")
        return limit


class Blockwise:
    """Values in steps of their block's largest magnitude over ``levels``; the steps are fp32 scales.

    Error: at most half the block's scale.
    Source: Dettmers et al. 2022, arXiv:2110.02861, section 2.1.
    """

    _smallest = np.finfo(np.float32).tiny  # below it a scale loses its precision, and at 0 nothing divides

    def __init__(self, levels: int, block: int) -> None:
        self._levels, self._block = levels, block
        # A scale that is rounded up could carry the largest values of fp32 to infinity.
        self._largest = np.nextafter(np.finfo(np.float32).max / np.float32(levels), np.float32(0))
        self._scale = Part(suffix=".scale", dtype="F32", values=block)
        self._steps = np.empty(PIECE_VALUES, np.float32)
        self._starts = np.arange(0, PIECE_VALUES, block)

    def _quantise(self, values: Values, scale: Raw) -> Values:
        """The nearest step of each value, an integer from -levels to levels."""
        steps, scales = self._steps[: len(values)], scale.view("<f4")
        np.abs(values, out=steps)
        np.maximum.reduceat(steps, self._starts[: len(scales)], out=scales)
        np.divide(scales, self._levels, out=scales)
        np.clip(scales, self._smallest, self._largest, out=scales)
        self._by_block(np.divide, values, scales, steps)
        return np.rint(steps, out=steps)

    def _by_block(self, operation: Any, values: Values, scales: Values, out: Values) -> None:
        """Apply each block's scale to its values; the last block may be short."""
        rows = len(values) // self._block
        end, by_block = rows * self._block, (rows, self._block)
        with np.errstate(over="ignore"):  # a peer's scales may be absurd: whoever checks the result tells
            operation(values[:end].reshape(by_block), scales[:rows, None], out=out[:end].reshape(by_block))
            operation(values[end:], scales[rows:], out=out[end:])

    def _check(self, scale: Raw) -> float:
        scales = scale.view("<f4")
        low, high = float(scales.min()), float(scales.max())
        if not (low >= 0 and np.isfinite(high)):  # NaN fails every comparison
            index = int(np.argmin(np.isfinite(scales) & (scales >= 0)))
            raise BadTensor(f"a scale is {scales[index]}, wanted a finite number of 0 or more")
        return high * (self._levels + 1)


class Int8(Blockwise):
    """255 steps, a byte each."""

    def __init__(self, block: int) -> None:
        super().__init__(127, block)
        self.parts = (Part(suffix=".q", dtype="I8"), self._scale)

    def encode(self, values: Values, raws: Sequence[Raw]) -> None:
        np.copyto(raws[0].view(np.int8), self._quantise(values, raws[1]), casting="unsafe")

    def decode(self, raws: Sequence[Raw], values: Values) -> None:
        np.copyto(values, raws[0].view(np.int8))
        self._by_block(np.multiply, values, raws[1].view("<f4"), values)

    def limit(self, raws: Sequence[Raw]) -> float:
        return self._check(raws[1])


class Int4(Blockwise):
    """15 steps, two to a byte: the piece's first half in the low nibbles, its second in the high ones."""

    def __init__(self, block: int) -> None:
        super().__init__(7, block)
        self.parts = (Part(suffix=".q", dtype="U8", values=2), self._scale)
        self._nibbles = np.empty(PIECE_VALUES, np.uint8)

    def encode(self, values: Values, raws: Sequence[Raw]) -> None:
        steps = self._quantise(values, raws[1])
        np.add(steps, 8, out=steps)
        nibbles, packed, half = self._nibbles[: len(values)], raws[0], len(raws[0])
        np.copyto(nibbles, steps, casting="unsafe")
        high = nibbles[half:]
        np.multiply(high, 16, out=high)
        np.copyto(packed, nibbles[:half])
        packed[: len(high)] |= high

    def decode(self, raws: Sequence[Raw], values: Values) -> None:
        nibbles, packed, half = self._nibbles[: len(values)], raws[0], len(raws[0])
        np.bitwise_and(packed, 15, out=nibbles[:half])
        np.right_shift(packed[: len(values) - half], 4, out=nibbles[half:])
        np.copyto(values, nibbles)
        np.subtract(values, 8, out=values)
        self._by_block(np.multiply, values, raws[1].view("<f4"), values)

    def limit(self, raws: Sequence[Raw]) -> float:
        return self._check(raws[1])
