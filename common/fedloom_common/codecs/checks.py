"""What a tensor's values must be, and how an error tells which one is not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import numpy as np

from fedloom_common.codecs.values import PIECE_VALUES, Raw, Values
from fedloom_common.errors import BadTensor
from fedloom_common.floats import encode, first_not_finite, value_at
from fedloom_common.tensors import ITEM_BYTES, TensorInfo


@contextmanager
def naming(info: TensorInfo) -> Iterator[None]:
    """Put the tensor's name before the message of any BadTensor inside."""
    try:
        yield
    except BadTensor as error:
        raise BadTensor(f"tensor {info.name}: {error}") from error


def require_finite(raw: Raw, info: TensorInfo, piece: int) -> None:
    """Check a piece of a tensor in the model's own type.

    Raises:
        BadTensor: a value is NaN or infinite.
    """
    found = first_not_finite(raw, info.dtype)
    if found is not None:
        refuse(info, piece, found, f"holds {value_at(raw, info.dtype, found)}")


def in_own_type(values: Values, info: TensorInfo, piece: int) -> Raw:
    """The bytes of a piece's values in the model's own type.

    Raises:
        BadTensor: a value is not finite, or becomes infinite in that type.
    """
    raw = np.empty(len(values) * ITEM_BYTES[info.dtype], np.uint8)
    found = first_not_finite(values.view(np.uint8), "F32")
    if found is None:
        with np.errstate(over="ignore"):  # told by the check below instead
            encode(values, info.dtype, raw)
        found = first_not_finite(raw, info.dtype)
    if found is not None:
        refuse(info, piece, found, f"would hold {values[found]}")
    return raw


def refuse(info: TensorInfo, piece: int, place: int, what: str) -> NoReturn:
    """Tell of the value at a place of a piece."""
    flat = piece * PIECE_VALUES + place
    index = [int(part) for part in np.unravel_index(flat, info.shape)]
    raise BadTensor(f"{what} at index {index}, wanted finite {info.dtype} values")
