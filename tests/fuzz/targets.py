"""What is fuzzed: each target takes any bytes, says whether they were read, and fails by any other error."""

import asyncio
import atexit
import contextlib
import functools
import json
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from enum import StrEnum, auto
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import deserialize, save_file

from fedloom.v1.transfer_pb2 import Chunk as ChunkMessage
from fedloom_common.chunks import CHUNK_BYTES, Chunk
from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import Decoder
from fedloom_common.codecs.encoder import encode_model
from fedloom_common.codecs.spec import Codecs
from fedloom_common.digests import Digest
from fedloom_common.errors import BadChunk, BadTensor, ProtocolError
from fedloom_common.partial import PartialFile
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import HEADER_LIMIT_BYTES, Manifest

BASE_DIGEST = "blake3:" + "ab" * 32
CHAINS = (
    "fp32",
    "bf16",
    "fp16",
    "int8",
    "int4",
    ("bf16", "zstd"),
    ("topk", "int8"),
    ("topk", "fp32", "zstd"),
)
ALLOCATED_BYTES = 4 << 20  # a decoder's scratch memory, and room for what Python keeps

FILE = bytes(range(256)) * 16
_OTHER_BYTES = bytes(byte ^ 0x55 for byte in FILE)


class Verdict(StrEnum):
    """What became of an input."""

    READ = auto()
    REFUSED = auto()


def chunk(data: bytes) -> Verdict:
    """What protobuf reads is read alike; what it refuses is refused."""
    try:
        wanted = ChunkMessage.FromString(data)
    except DecodeError:
        with contextlib.suppress(ProtocolError):
            Chunk.decode(data)
            raise AssertionError("protobuf refuses it, and it was read") from None
        return Verdict.REFUSED
    came = Chunk.decode(data)
    assert (came.upload, came.offset, came.crc32c) == (wanted.upload, wanted.offset, wanted.crc32c)
    assert bytes(came.payload) == wanted.payload
    return Verdict.READ


def header(data: bytes) -> Verdict:
    """What is accepted is what the safetensors library reads, with the same tensors; memory stays bounded."""
    path = _scratch() / "model.safetensors"
    path.write_bytes(data)
    with _bounded(64 * len(data) + (1 << 20)):
        try:
            manifest = Manifest.read(path)
        except BadTensor:
            return Verdict.REFUSED
    try:
        wanted = dict(deserialize(data))
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses it ({error}), and it was read") from error
    came = {
        info.name: (info.dtype, list(info.shape), data[info.start_bytes : info.start_bytes + info.size_bytes])
        for info in manifest.tensors
    }
    assert came == {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in wanted.items()}
    assert manifest.size_bytes == len(data) <= HEADER_LIMIT_BYTES + len(data)
    return Verdict.READ


def update(data: bytes) -> Verdict:
    """An encoded update that passes its check decodes to finite values; the first byte chooses the chain."""
    chain = CHAINS[data[0] % len(CHAINS)] if data else CHAINS[0]
    path = _scratch() / "update.safetensors"
    path.write_bytes(data[1:])
    with TensorFile(base_model()) as base, _bounded(64 * len(data) + ALLOCATED_BYTES):
        try:
            with Decoder(path, _chain(chain), base=base, base_digest=BASE_DIGEST) as decoder:
                decoder.check()
                for info in base.manifest.tensors:
                    values = np.empty(info.size_bytes // 4, np.float32)
                    decoder.read(info.name, 0, values)
                    assert np.isfinite(values).all()
        except BadTensor:
            return Verdict.REFUSED
    return Verdict.READ


def partial(data: bytes) -> Verdict:
    """Chunks in any order and state write no byte that is not the file's, and no wrong whole is accepted.

    Four bytes a step: what to do, and the place and length of a chunk.
    """
    return asyncio.run(_feed(data))


async def _feed(data: bytes) -> Verdict:
    verdict = Verdict.REFUSED
    path = _scratch() / "partial"
    path.unlink(missing_ok=True)
    digest = Digest()
    digest.add(FILE)
    file = PartialFile(path, len(FILE), str(digest))
    try:
        for place in range(0, len(data) - 3, 4):
            kind, at, long = data[place], data[place + 1] * 17, data[place + 2] * 256 + data[place + 3]
            if kind % 8 == 7:  # the process dies, or the stream breaks
                await file.close()
                file = PartialFile(path, len(FILE), str(digest))
                continue
            with contextlib.suppress(BadChunk):
                await file.add(_chunk_of(kind, file.offset, at, long))
        with contextlib.suppress(BadChunk):
            await file.finish()
            assert path.read_bytes() == FILE
            verdict = Verdict.READ
    finally:
        await file.close()
    held = path.read_bytes()
    assert held == FILE[: len(held)], "a byte that is not the file's was written"
    return verdict


def _chunk_of(kind: int, offset: int, at: int, long: int) -> Chunk:
    """A chunk: most are the next one, others are elsewhere, corrupt, surplus or too large."""
    match kind % 8:
        case 0:
            return Chunk.of(FILE[at : at + long], at)
        case 1:
            right = Chunk.of(FILE[offset : offset + long], offset)
            return Chunk(payload=_OTHER_BYTES[offset : offset + long], offset=offset, crc32c=right.crc32c)
        case 2:
            return Chunk.of(FILE[offset:] + bytes(long + 1), offset)
        case 3:
            return Chunk.of(bytes(CHUNK_BYTES + 1), offset)
        case _:
            return Chunk.of(FILE[offset : offset + long % 600], offset)


@contextlib.contextmanager
def _bounded(limit_bytes: int) -> Iterator[None]:
    """Fail if Python or numpy allocates more at a time."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit_bytes, f"{peak} bytes were allocated, the limit is {limit_bytes}"


@functools.cache
def _scratch() -> Path:
    folder = tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def _chain(stages: str | tuple[str, ...]) -> Chain:
    return Chain(TypeAdapter(Codecs).validate_python(list(stages) if isinstance(stages, tuple) else stages))


@functools.cache
def base_model() -> Path:
    """A small model that updates are encoded against."""
    path = _scratch() / "base.safetensors"
    generator = np.random.default_rng(5)
    tensors = {"w": generator.standard_normal((3, 40), np.float32), "b": np.zeros(5, np.float32)}
    save_file(tensors, path, {"format": "pt"})
    return path


def seeds() -> dict[str, list[bytes]]:
    """Well-formed inputs of each target, from which fuzzing starts."""
    message = ChunkMessage(upload="up", offset=300, crc32c=7, payload=b"abc").SerializeToString()
    trained = _scratch() / "trained.safetensors"
    generator = np.random.default_rng(6)
    save_file(
        {"w": generator.standard_normal((3, 40), np.float32), "b": np.ones(5, np.float32)},
        trained,
        {"format": "pt"},
    )
    updates = []
    for number, stages in enumerate(CHAINS):
        out = _scratch() / "encoded.safetensors"
        with TensorFile(base_model()) as base, TensorFile(trained) as model:
            encode_model(_chain(stages), trained=model, base=base, base_digest=BASE_DIGEST, out=out)
        updates.append(bytes([number]) + out.read_bytes())
    empty = json.dumps(
        {"__metadata__": {"a": "b"}, "x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    )
    small = json.dumps({"x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}})
    headers = [len(text).to_bytes(8, "little") + text.encode() for text in (empty, small, "{}")]
    headers[1] += b"ab"
    steps = [bytes([4, 0, 2, 87]) * 7, bytes([4, 0, 2, 0, 7, 0, 0, 0, 1, 0, 1, 0, 4, 0, 2, 0])]
    return {
        "chunk": [message, message + message, message[::-1]],
        "header": [*headers, base_model().read_bytes()],
        "update": updates,
        "partial": steps,
    }


TARGETS: dict[str, Callable[[bytes], Verdict]] = {
    "chunk": chunk,
    "header": header,
    "update": update,
    "partial": partial,
}
