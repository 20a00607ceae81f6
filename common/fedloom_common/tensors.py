"""Models as safetensors files: the manifest, and reading and writing a tensor at a time.

The global model, an update and a checkpoint are all this one format, so any
tool of the ecosystem opens what lies in a store. Nothing here needs torch
until a tensor is touched, and nothing is ever unpickled.
Source: the safetensors format, https://huggingface.co/docs/safetensors.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fedloom_common.errors import BadTensor
from fedloom_common.files import atomic_file

if TYPE_CHECKING:
    import torch

HEADER_LIMIT_BYTES = 16 << 20  # a model of 1,000 layers needs under 2 MB; read nothing larger from a peer
LONGEST_NAME = 500
MOST_DIMENSIONS = 16  # bounds the product of a shape, which is taken before the tensor's size is known
HEADER_ALIGN_BYTES = 8  # tensors begin at a multiple, so that a mapped file can be viewed in place

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor's entry in a manifest."""

    name: str
    dtype: str
    """safetensors' name: "F32", "BF16" and so on."""
    shape: tuple[int, ...]
    start_bytes: int
    """Place of the first byte in the file."""
    size_bytes: int

    @property
    def is_float(self) -> bool:
        """Whether values of this type are averaged; others are carried over as they are."""
        return self.dtype in FLOATS


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Names, types, shapes and places of the tensors in a file."""

    tensors: tuple[TensorInfo, ...]
    """In the order of their bytes."""
    metadata: dict[str, str]
    size_bytes: int
    """Size that the whole file must have."""

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read and check the header of a safetensors file.

        Raises:
            BadTensor: the file is not safetensors, its sizes do not add up, or it is cut short.
        """
        with path.open("rb") as file:
            actual = os.fstat(file.fileno()).st_size
            manifest = cls._parse(file, actual)
        if actual != manifest.size_bytes:
            raise BadTensor(f"the file has {actual} bytes, its header describes {manifest.size_bytes}")
        return manifest

    @classmethod
    def _parse(cls, file: BinaryIO, file_bytes: int) -> "Manifest":
        prefix = file.read(8)
        if len(prefix) < 8:
            raise BadTensor(f"not a safetensors file: {len(prefix)} bytes, a header needs 8 and more")
        (length,) = struct.unpack("<Q", prefix)
        if length > HEADER_LIMIT_BYTES:
            raise BadTensor(
                f"not a safetensors file: a header of {length} bytes, the limit is {HEADER_LIMIT_BYTES}"
            )
        if length > file_bytes - 8:  # told before memory is set aside for it
            raise BadTensor(f"the header ends after {file_bytes - 8} of {length} bytes")
        text = file.read(length)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadTensor(f"the safetensors header is not JSON: {error}") from error
        return _manifest_of(header, 8 + length)

    def __getitem__(self, name: str) -> TensorInfo:
        """The entry of one tensor; KeyError if there is none."""
        for info in self.tensors:
            if info.name == name:
                return info
        raise KeyError(name)

    def require_same_tensors(self, other: "Manifest") -> None:
        """Check that ``other`` has this manifest's tensors: names, types and shapes.

        Raises:
            BadTensor: names the first tensor that differs, what came and what was wanted.
        """
        came = {info.name: info for info in other.tensors}
        for want in self.tensors:
            have = came.pop(want.name, None)
            if have is None:
                raise BadTensor(f"tensor {want.name} is missing")
            if have.shape != want.shape:
                raise BadTensor(f"tensor {want.name} has shape {list(have.shape)}, wanted {list(want.shape)}")
            if have.dtype != want.dtype:
                raise BadTensor(f"tensor {want.name} has dtype {have.dtype}, wanted {want.dtype}")
        if came:
            raise BadTensor(f"tensor {min(came)} is not in the model")


def _manifest_of(header: Any, data_start: int) -> Manifest:
    if not isinstance(header, dict):
        raise BadTensor("the safetensors header is not a mapping")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadTensor("the safetensors header's __metadata__ is not a mapping of text")
    infos = sorted((_info_of(name, entry, data_start) for name, entry in header.items()), key=_place)
    end = data_start
    for info in infos:
        if info.start_bytes != end:
            raise BadTensor(f"tensor {info.name} begins at byte {info.start_bytes}, wanted {end}")
        end += info.size_bytes
    return Manifest(tensors=tuple(infos), metadata=metadata, size_bytes=end)


def _place(info: TensorInfo) -> tuple[int, int]:
    return info.start_bytes, info.size_bytes


def _info_of(name: str, entry: Any, data_start: int) -> TensorInfo:
    if len(name) > LONGEST_NAME:
        raise BadTensor(f"a tensor has a name of {len(name)} characters, the limit is {LONGEST_NAME}")
    if not name.isprintable():
        raise BadTensor(f"a tensor's name has characters that cannot be shown: {name!a}")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise BadTensor(f"tensor {name}'s header entry lacks dtype, shape or data_offsets") from error
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BadTensor(f"tensor {name} has dtype {dtype!r}, wanted one of {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS:
        raise BadTensor(f"tensor {name} has no shape, or one of more than {MOST_DIMENSIONS} dimensions")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, begin, end)):
        raise BadTensor(f"tensor {name}'s shape or offsets are not sizes: {str([shape, begin, end])[:200]}")
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != size:
        raise BadTensor(f"tensor {name} has {end - begin} bytes, its shape {shape} of {dtype} needs {size}")
    return TensorInfo(
        name=name, dtype=dtype, shape=tuple(shape), start_bytes=data_start + begin, size_bytes=size
    )


def write_tensors(
    path: Path,
    tensors: Mapping[str, "torch.Tensor"],
    metadata: Mapping[str, str] | None = None,
    *,
    durable: bool = True,
    over: Path | None = None,
    whole: "Callable[[torch.Tensor], torch.Tensor] | None" = None,
) -> None:
    """Write a safetensors file, in place only when whole and, if ``durable``, on disk.

    ``over`` is a file to use up for it, as :func:`atomic_file` tells. ``whole`` makes a tensor whole of
    which only a part is in this process; it is called for each once, in order.

    Memory: one tensor's copy on the CPU at a time.
    """
    header = encode_header(
        ((name, _dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()), metadata
    )
    with atomic_file(path, durable=durable, over=over) as file:
        file.write(header)
        for tensor in tensors.values():
            file.write(tensor_bytes(whole(tensor) if whole else tensor))


def encode_header(
    entries: Iterator[tuple[str, str, tuple[int, ...]]] | list[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The header of a file whose tensors (name, safetensors dtype, shape) follow in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    place = 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGN_BYTES)
    return struct.pack("<Q", len(text)) + text


def read_tensors(path: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Each tensor of a file in turn; the tensor's memory is its own."""
    manifest = Manifest.read(path)
    with path.open("rb", buffering=0) as file:
        for info in manifest.tensors:
            yield info.name, read_tensor(file.fileno(), info)


def read_tensor(descriptor: int, info: TensorInfo) -> "torch.Tensor":
    """One tensor from an open file."""
    import torch

    tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    read_into(descriptor, memoryview(tensor_bytes(tensor)), info.start_bytes)
    return tensor


def read_into(descriptor: int, buffer: memoryview, start_bytes: int) -> None:
    """Fill ``buffer`` from an open file at a place, whatever the kernel returns in one call.

    Raises:
        BadTensor: the file ends early.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start_bytes + done)
        if count == 0:
            raise BadTensor(f"the file ends at byte {start_bytes + done}, wanted {start_bytes + len(buffer)}")
        done += count


def tensor_bytes(tensor: "torch.Tensor") -> Any:
    """A tensor's bytes as a flat buffer: a view where it is contiguous and on the CPU, else a copy."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def torch_dtype(name: str) -> "torch.dtype":
    """The torch type of a safetensors type."""
    return _torch_dtypes()[name]


def _dtype_name(tensor: "torch.Tensor") -> str:
    for name, dtype in _torch_dtypes().items():
        if dtype == tensor.dtype:
            return name
    raise BadTensor(f"tensors of {tensor.dtype} cannot be stored; wanted one of {', '.join(ITEM_BYTES)}")


def _torch_dtypes() -> dict[str, "torch.dtype"]:
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip
