"""The float types of safetensors as numpy arrays, bfloat16 included.

numpy has no bfloat16, and importing torch for it alone would cost the
coordinator some 200 MB of memory.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom_common.tensors import ITEM_BYTES

_NATIVE: dict[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_EXPONENT_BITS = {"F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}


def decode(raw: NDArray[np.uint8], dtype: str, values: NDArray[np.floating[Any]]) -> None:
    """Write the values that ``raw`` holds to ``values``: exact, unless it is the narrower type."""
    if dtype != "BF16":
        np.copyto(values, raw.view(_NATIVE[dtype]), casting="same_kind")
    elif values.dtype == np.float32:  # a bfloat16 is the upper half of a float32
        bits = values.view("<u4")
        np.copyto(bits, raw.view("<u2"))
        np.left_shift(bits, 16, out=bits)
    else:
        bits = raw.view("<u2").astype("<u4")
        bits <<= 16
        np.copyto(values, bits.view("<f4"))


def encode(values: NDArray[np.floating[Any]], dtype: str, raw: NDArray[np.uint8]) -> None:
    """Write finite ``values`` to ``raw``, rounded to nearest, ties to even."""
    if dtype == "BF16":
        bits = values.astype("<f4", copy=False).view("<u4")
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        np.copyto(raw.view("<u2"), rounded, casting="same_kind")
    else:
        np.copyto(raw.view(_NATIVE[dtype]), values, casting="same_kind")


def first_not_finite(raw: NDArray[np.uint8], dtype: str) -> int | None:
    """Index of the first NaN or infinity in ``raw``.

    Looks at bits: all exponent bits are set in these values and in no other.
    Two integer maxima, one for each sign, are several times faster than
    isfinite, need no scratch memory, and treat every type alike.
    """
    exponent, item = _EXPONENT_BITS[dtype], ITEM_BYTES[dtype]
    signed, unsigned = raw.view(f"<i{item}"), raw.view(f"<u{item}")
    sign = 1 << (8 * item - 1)
    if not raw.size or (signed.max() < exponent and unsigned.max() < sign | exponent):
        return None
    return int(np.argmax((unsigned & exponent) == exponent))


def magnitude(raw: NDArray[np.uint8], dtype: str) -> float:
    """The largest magnitude in ``raw``, NaN or infinity if it holds one; 0 for nothing."""
    if not raw.size:
        return 0.0
    item = ITEM_BYTES[dtype]
    positive, negative = raw.view(f"<i{item}").max(), raw.view(f"<u{item}").max()
    sign = 1 << (8 * item - 1)
    bits = max(int(positive), int(negative) - sign, 0)
    return value_at(np.frombuffer(bits.to_bytes(item, "little"), np.uint8), dtype, 0)


def value_at(raw: NDArray[np.uint8], dtype: str, index: int) -> float:
    """One value of ``raw``."""
    value, item = np.empty(1), ITEM_BYTES[dtype]
    with np.errstate(invalid="ignore"):  # a signalling NaN is a value to tell of, too
        decode(raw[index * item : (index + 1) * item], dtype, value)
    return float(value[0])
