"""SCAFFOLD's control variates in a model's file: tensor ``control/NAME`` beside tensor ``NAME``.

In a global model they are the server's c, in an update c + Δcₖ, so that they travel, are checked,
encoded and averaged as the model is. They are fp32 whatever the model's types, as they are gradients.
Source: Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from fedloom_common.files import atomic_file
from fedloom_common.tensors import ITEM_BYTES, Manifest, encode_header

CONTROL = "control/"
COPY_BYTES = 1 << 20

Entry = tuple[str, str, tuple[int, ...]]


def control_of(name: str) -> str:
    """The name of a tensor's control variate."""
    return CONTROL + name


def is_control(name: str) -> bool:
    """Whether a tensor of a model's file is a control variate, and no part of the model."""
    return name.startswith(CONTROL)


def without_controls(manifest: Manifest) -> Manifest:
    """The model's own tensors, at their places in the file."""
    return replace(manifest, tensors=tuple(info for info in manifest.tensors if not is_control(info.name)))


def has_controls(model: Path) -> bool:
    """Whether a model's file holds control variates."""
    return any(is_control(info.name) for info in Manifest.read(model).tensors)


def add_controls(model: Path, out: Path) -> None:
    """Write a model with control variates of zero, the algorithm's start; ``out`` may be the model's file."""
    infos = without_controls(Manifest.read(model)).tensors
    _copy_model(model, out, [(control_of(info.name), "F32", info.shape) for info in infos if info.is_float])


def drop_controls(model: Path, out: Path) -> None:
    """Write the model alone; ``out`` may be the model's file."""
    _copy_model(model, out, [])


def _copy_model(source: Path, out: Path, zeros: Sequence[Entry]) -> None:
    """Write a file's model and tensors of zeros, those of wide elements first, as readers align them."""
    manifest = Manifest.read(source)
    kept = {info.name: info for info in without_controls(manifest).tensors}
    entries = [(info.name, info.dtype, info.shape) for info in kept.values()] + list(zeros)
    entries.sort(key=lambda entry: -ITEM_BYTES[entry[1]])
    with source.open("rb", buffering=0) as reader, atomic_file(out) as file:
        file.write(encode_header(entries, manifest.metadata))
        for name, dtype, shape in entries:
            if (info := kept.get(name)) is None:
                file.seek(math.prod(shape) * ITEM_BYTES[dtype], os.SEEK_CUR)
            else:
                reader.seek(info.start_bytes)
                _copy_bytes(reader, file, info.size_bytes)
        file.truncate()  # where the last zeros end


def _copy_bytes(reader: IO[bytes], file: IO[bytes], count: int) -> None:
    while count > 0:
        count -= file.write(reader.read(min(count, COPY_BYTES)))
