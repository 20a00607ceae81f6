"""Bare gRPC, the best way known: 1 MiB chunks, no protobuf objects, hand-encoded bytes, one join a chunk.

A chunk is the bytes of a protobuf message {uint64 offset = 2; bytes payload = 4}. Its head is padded to 16
bytes, so that values lie aligned in memory and are added where they are.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from bare_process import CHUNK_BYTES, Setting, Sum

from fedloom_common.channels import CHANNEL_OPTIONS, SERVER_OPTIONS, window
from fedloom_common.identity import TlsFiles
from fedloom_common.rotation import LiveCredential

SERVICE = "bare.Transfer"
HEAD_BYTES = 16
WINDOW_BYTES = 4 << 20  # the quickest of those tried
SOURCE_BYTES = 64 << 20  # sent over and over: past every cache, as a model is

Context = grpc.aio.ServicerContext[bytes, bytes]


def serve(setting: Setting, held: Sum) -> None:
    """Take models in and add them up, and send the model that is held."""
    _run_in_thread(_serve(setting, held))


def connect(setting: Setting) -> Callable[[], None]:
    """A function that sends one model, or receives one."""
    loop = asyncio.new_event_loop()
    upload, broadcast = loop.run_until_complete(_open(setting))
    ones = np.ones(SOURCE_BYTES // 4, np.float32).data.cast("B")

    async def send() -> None:
        call = upload()
        for offset in range(0, setting.model_bytes, CHUNK_BYTES):
            begin = offset % SOURCE_BYTES
            piece = ones[begin : begin + min(CHUNK_BYTES, setting.model_bytes - offset)]
            await call.write(_encode(offset, piece))
        await call.done_writing()
        await call

    async def receive() -> None:
        came = 0
        async for chunk in broadcast(b""):
            came += len(chunk) - HEAD_BYTES
        assert came == setting.model_bytes

    transfer = send if setting.kind == "grpc upload" else receive
    return lambda: loop.run_until_complete(transfer())


async def _serve(setting: Setting, held: Sum) -> None:
    async def upload(chunks: AsyncIterator[bytes], context: Context) -> bytes:
        async for chunk in chunks:
            held.add(_offset(chunk), chunk, HEAD_BYTES)
        return b""

    async def broadcast(request: bytes, context: Context) -> AsyncIterator[bytes]:
        model = held.values.data.cast("B")
        for offset in range(0, setting.model_bytes, CHUNK_BYTES):
            yield _encode(offset, model[offset : offset + CHUNK_BYTES])

    server = grpc.aio.server(options=[*SERVER_OPTIONS, window(WINDOW_BYTES)])
    handlers: dict[str, Any] = {
        "Upload": grpc.stream_unary_rpc_method_handler(upload),
        "Broadcast": grpc.unary_stream_rpc_method_handler(broadcast),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    address = f"localhost:{setting.port}"
    if setting.credentials:
        server.add_secure_port(address, _tls(setting, "coordinator", "coordinator").for_servers())
    else:
        server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


async def _open(setting: Setting) -> tuple[Any, Any]:
    """The two calls of a connected channel."""
    address = f"localhost:{setting.port}"
    options = [*CHANNEL_OPTIONS, window(WINDOW_BYTES)]
    if setting.credentials:
        credentials = _tls(setting, "sites/site-1", "site").for_channels()
        channel = grpc.aio.secure_channel(
            address, credentials, options=[*CHANNEL_OPTIONS, window(WINDOW_BYTES)]
        )
    else:
        channel = grpc.aio.insecure_channel(address, options=options)
    await channel.channel_ready()
    return channel.stream_unary(f"/{SERVICE}/Upload"), channel.unary_stream(f"/{SERVICE}/Broadcast")


def _tls(setting: Setting, place: str, role: str) -> LiveCredential:
    folder = Path(setting.credentials) / place
    return LiveCredential(
        TlsFiles(ca=folder / "ca.crt", certificate=folder / f"{role}.crt", key=folder / f"{role}.key")
    )


def _encode(offset: int, payload: memoryview) -> bytes:
    return b"".join((b"\x10", _varint(offset, 9), b"\x22", _varint(len(payload), 5), payload))


def _varint(value: int, width: int) -> bytes:
    """A varint of a fixed width; protobuf readers take the padding."""
    groups = [(value >> (7 * place)) & 0x7F | 0x80 for place in range(width)]
    groups[-1] &= 0x7F
    return bytes(groups)


def _offset(chunk: bytes) -> int:
    return sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(chunk[1:10]))


def _run_in_thread(running: Coroutine[Any, Any, None]) -> None:
    threading.Thread(target=asyncio.run, args=(running,), daemon=True).start()
