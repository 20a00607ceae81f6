"""A model whose tensors are read in pieces, wherever it is."""

from pathlib import Path
from typing import Protocol, Self

from fedloom_common.tensors import Manifest, read_into


class TensorSource(Protocol):
    """A model whose tensors are read in pieces: a file, or memory."""

    @property
    def manifest(self) -> Manifest:
        """Names, types and shapes."""

    def read(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from a place within a tensor."""


class TensorFile:
    """A safetensors file as a source of pieces."""

    def __init__(self, path: Path) -> None:
        self.manifest = Manifest.read(path)
        self._starts_bytes = {info.name: info.start_bytes for info in self.manifest.tensors}
        self._file = path.open("rb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def descriptor(self) -> int:
        """The open file."""
        return self._file.fileno()

    def read(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from a place within a tensor."""
        read_into(self._file.fileno(), buffer, self._starts_bytes[name] + offset_bytes)
