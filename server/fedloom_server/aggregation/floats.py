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


def decode(raw: NDArray[np.uint8], dtype: str, values: NDArray[np.float64]) -> None:
    """Write the values that ``raw`` holds to ``values``; exact for every type."""
    if dtype == "BF16":
        bits = raw.view("<u2").astype("<u4")
        bits <<= 16  # a bfloat16 is the upper half of a float32
        np.copyto(values, bits.view("<f4"))
    else:
        np.copyto(values, raw.view(_NATIVE[dtype]))


def encode(values: NDArray[np.float64], dtype: str, raw: NDArray[np.uint8]) -> None:
    """Write finite ``values`` to ``raw``, rounded to nearest, ties to even."""
    if dtype == "BF16":
        bits = values.astype("<f4").view("<u4")
        bits += ((bits >> 16) & 1) + 0x7FFF
        bits >>= 16
        np.copyto(raw.view("<u2"), bits, casting="same_kind")
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


def value_at(raw: NDArray[np.uint8], dtype: str, index: int) -> float:
    """One value of ``raw``."""
    value, item = np.empty(1), ITEM_BYTES[dtype]
    decode(raw[index * item : (index + 1) * item], dtype, value)
    return float(value[0])
