"""Which tensors of an adapter change which weight, and how: a file beside the model's config."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom_common.errors import BadTensor
from fedloom_common.files import write_text
from fedloom_common.floats import decode
from fedloom_common.tensorfiles import TensorFile

LAYOUT_FILE = "adapter_layout.json"
CONFIG_FILE = "adapter_config.json"
"""peft's own description of the adapter."""
BASE_FILE = "base.safetensors"
"""The weights under the adapter, which nobody trains."""
FROZEN_A_FILE = "adapter_a.safetensors"
"""The half of an adapter that is drawn once and not trained (FFA)."""

PREFIX = "base_model.model."
"""What peft puts before a layer's name in an adapter's file."""

Values = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A weight that an adapter changes."""

    weight: str
    """Its name in the base."""
    a: str
    """Name of A [rank, inputs] in the adapter."""
    b: str
    """Name of B [outputs, rank] in the adapter."""
    is_transposed: bool
    """Whether the weight is [inputs, outputs], as GPT-2 has it."""

    def factors(self, a: Values, b: Values, scale: float) -> tuple[Values, Values]:
        """The change  scale · B·A  as two factors whose product has the shape of the weight."""
        return (a.T * scale, b.T) if self.is_transposed else (b * scale, a)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All targets of an adapter."""

    alpha: float
    targets: tuple[Target, ...]
    heads: tuple[str, ...] = ()
    """Weights that are trained whole and travel with the adapter, such as a classifier's, by their names in
    the base; :func:`head_name` tells those in the adapter."""

    def scale(self, rank: int) -> float:
        """What  B·A  is multiplied by: α/r, as peft does."""
        return self.alpha / rank

    def write(self, folder: Path) -> None:
        """Write the layout's file."""
        write_text(folder / LAYOUT_FILE, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Layout":
        """Read a layout's file.

        Raises:
            BadTensor: it is no layout.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            targets = tuple(Target(**target) for target in content["targets"])
            return cls(alpha=float(content["alpha"]), targets=targets, heads=tuple(content.get("heads", ())))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadTensor(f"{path.name} does not tell an adapter's layout: {error!r}") from error


def head_name(weight: str) -> str:
    """The name in an adapter's file of a weight that is trained whole."""
    return PREFIX + weight


def read_values(file: TensorFile, name: str, dtype: type[np.floating[Any]] = np.float32) -> Values:
    """One float tensor, whole, in its shape.

    Raises:
        BadTensor: the file has no such tensor, or it is none of floats.
    """
    try:
        info = file.manifest[name]
    except KeyError as error:
        raise BadTensor(f"tensor {name} is missing") from error
    if not info.is_float:
        raise BadTensor(f"tensor {name} has dtype {info.dtype}, wanted a floating-point type")
    raw = np.empty(info.size_bytes, np.uint8)
    file.read(name, 0, raw.data)
    exact = np.empty(info.shape, np.float64 if info.dtype == "F64" else np.float32)
    decode(raw, info.dtype, exact.reshape(-1))
    return exact.astype(dtype, copy=False)
