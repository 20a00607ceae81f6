import errno
import os

import google_crc32c
import grpc
import pytest

from fedloom.v1.transfer_pb2 import Chunk
from fedloom.v1.transfer_pb2_grpc import (
    TransferServiceServicer,
    TransferServiceStub,
    add_TransferServiceServicer_to_server,
)
from fedloom_common import transfer
from fedloom_common.errors import BadChunk, NotFound, StorageFull, Unreachable
from fedloom_common.files import digest_of_file
from fedloom_common.rpc import status_of
from fedloom_common.transfer import CHUNK_BYTES, PartialFile, chunks_of, download

CONTENT = os.urandom(3 * CHUNK_BYTES + 12345)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def chunk_at(offset: int, size: int, **changes) -> Chunk:
    payload = CONTENT[offset : offset + size]
    fields = {"offset": offset, "payload": payload, "crc32c": google_crc32c.value(payload)}
    return Chunk(**(fields | changes))


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, len(CONTENT) - 1, len(CONTENT)])
async def test_chunks_are_the_file_from_an_offset(source, offset):
    chunks = [chunk async for chunk in chunks_of(source, offset, "up")]
    assert b"".join(chunk.payload for chunk in chunks) == CONTENT[offset:]
    assert all(chunk.crc32c == google_crc32c.value(chunk.payload) for chunk in chunks)
    assert [chunk.upload for chunk in chunks] == ["up", "", "", ""][: len(chunks)]


async def test_a_partial_file_is_taken_up_after_a_crash(tmp_path, source):
    digest = digest_of_file(source)
    first = await PartialFile.open(tmp_path / "part", len(CONTENT), digest)
    await first.add(chunk_at(0, 1000))
    await first.add(chunk_at(1000, 77))
    first.close()
    second = await PartialFile.open(tmp_path / "part", len(CONTENT), digest)
    assert second.offset == 1077
    async for chunk in chunks_of(source, 1077):
        await second.add(chunk)
    await second.finish()
    second.close()
    assert (tmp_path / "part").read_bytes() == CONTENT


BAD_CHUNKS = {
    "corrupt": (chunk_at(0, 100, payload=b"x" * 100), "is corrupt"),
    "gap": (chunk_at(100, 100), "begins at byte 100, wanted 0"),
    "oversized": (chunk_at(0, CHUNK_BYTES + 1), "the limit is"),
    "past-the-end": (Chunk(offset=0, payload=b"y" * 600), "the file has 500"),
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
async def test_a_bad_chunk_is_refused_and_leaves_no_trace(tmp_path, name):
    chunk, message = BAD_CHUNKS[name]
    size = 500 if name == "past-the-end" else len(CONTENT)
    partial = await PartialFile.open(tmp_path / "part", size, "sha256:0")
    with pytest.raises(BadChunk, match=message):
        await partial.add(chunk)
    partial.close()
    assert (tmp_path / "part").stat().st_size == 0


async def test_a_wrong_digest_empties_the_file(tmp_path):
    partial = await PartialFile.open(tmp_path / "part", 100, "sha256:" + "0" * 64)
    await partial.add(chunk_at(0, 100))
    with pytest.raises(BadChunk, match="send it again from byte 0"):
        await partial.finish()
    partial.close()
    assert (tmp_path / "part").stat().st_size == 0


async def test_a_short_file_is_not_finished(tmp_path):
    partial = await PartialFile.open(tmp_path / "part", 100, "sha256:0")
    await partial.add(chunk_at(0, 99))
    with pytest.raises(BadChunk, match="ends after 99 of 100"):
        await partial.finish()
    partial.close()


async def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    partial = await PartialFile.open(tmp_path / "part", 100, "sha256:0")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageFull, match=r"no space left for 100 bytes in .*: free some"):
        await partial.add(chunk_at(0, 100))
    partial.close()


class Flaky(TransferServiceServicer):
    """Serves one file and breaks off after every ``cut_bytes``."""

    def __init__(self, path, cut_bytes: int) -> None:
        self.path = path
        self.cut_bytes = cut_bytes
        self.sent_bytes = 0

    async def Read(self, request, context):
        if request.digest != digest_of_file(self.path):
            code, text, metadata = status_of(NotFound("no such file"))
            await context.abort(code, text, metadata)
        sent = 0
        async for chunk in chunks_of(self.path, request.offset):
            if sent + len(chunk.payload) > self.cut_bytes:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            sent += len(chunk.payload)
            self.sent_bytes += len(chunk.payload)
            yield chunk


@pytest.fixture
async def flaky(source):
    server = grpc.aio.server()
    servicer = Flaky(source, CHUNK_BYTES)
    add_TransferServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, TransferServiceStub(channel)
    await server.stop(None)


async def test_a_download_goes_on_after_each_cut_and_sends_no_byte_twice(
    tmp_path, flaky, source, monkeypatch
):
    monkeypatch.setattr(transfer, "RETRY_S", (0.01, 0.02))
    servicer, stub = flaky
    seen: list[int] = []
    target = tmp_path / "got"
    await download(stub, digest_of_file(source), len(CONTENT), target, seen.append)
    assert target.read_bytes() == CONTENT
    assert servicer.sent_bytes == len(CONTENT)
    assert seen == sorted(seen)
    assert seen[-1] == len(CONTENT)


async def test_a_download_without_progress_is_given_up(tmp_path, flaky, source, monkeypatch):
    monkeypatch.setattr(transfer, "RETRY_S", (0.01, 0.02))
    monkeypatch.setattr(transfer, "PATIENCE_S", 0.1)
    servicer, stub = flaky
    servicer.cut_bytes = 10
    with pytest.raises(Unreachable, match="does not answer"):
        await download(stub, digest_of_file(source), len(CONTENT), tmp_path / "got")
    assert not (tmp_path / "got").exists()


async def test_a_missing_file_is_not_asked_for_again(tmp_path, flaky):
    with pytest.raises(NotFound, match="no such file"):
        await download(flaky[1], "sha256:" + "1" * 64, 10, tmp_path / "got")
