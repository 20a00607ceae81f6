"""What a fake site can be told to do wrong."""

from enum import Enum, auto

import numpy as np

Tensors = dict[str, np.ndarray]


class Fault(Enum):
    """What a site does wrong in its training assignments."""

    NONE = auto()
    REFUSES = auto()
    FAILS = auto()
    SILENT = auto()
    NO_EXAMPLES = auto()
    TOO_MANY_EXAMPLES = auto()
    NAN = auto()
    MISSING_TENSOR = auto()
    SURPLUS_TENSOR = auto()
    WRONG_SHAPE = auto()
    WRONG_DTYPE = auto()
    NOT_SAFETENSORS = auto()
    CORRUPT_CHUNK = auto()
    WRONG_DIGEST = auto()
    TOO_LARGE = auto()
    CUT_ONCE = auto()
    NEVER_UPLOADS = auto()
    NEVER_EVALUATES = auto()
    REPEATS_ITSELF = auto()
    HUGE_NUMBERS = auto()
    ANNOUNCES_ANOTHER = auto()
    TALKS_WITHOUT_END = auto()
    ODD_NAMES = auto()
    NO_DIGEST = auto()
    EVALUATES_THE_WORLD = auto()
    REFUSES_ALONE = auto()


def spoil(tensors: dict[str, np.ndarray], fault: Fault) -> None:
    """Make of an update what is wrong with it."""
    match fault:
        case Fault.NAN:
            tensors["layer.weight"][1, 2] = np.nan
        case Fault.MISSING_TENSOR:
            del tensors["layer.bias"]
        case Fault.SURPLUS_TENSOR:
            tensors["layer.extra"] = np.zeros(3, np.float32)
        case Fault.WRONG_SHAPE:
            tensors["layer.bias"] = np.zeros((1,), np.float32)
        case Fault.WRONG_DTYPE:
            tensors["layer.bias"] = tensors["layer.bias"].astype(np.float64)
