import itertools
import os

import grpc
import pytest

from fedloom.v1 import transfer_pb2
from fedloom.v1.transfer_pb2_grpc import TransferServiceServicer, add_TransferServiceServicer_to_server
from fedloom_common import transfer
from fedloom_common.chunks import CHUNK_BYTES, Chunk
from fedloom_common.digests import digest_of_file
from fedloom_common.errors import BadChunk, NotFound, Unreachable
from fedloom_common.rpc import status_of
from fedloom_common.transfer import TransferStub, download, messages_of

CONTENT = os.urandom(3 * CHUNK_BYTES + 12345)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, len(CONTENT) - 1, len(CONTENT)])
async def test_messages_are_the_file_from_an_offset(source, offset):
    came = [(end, Chunk.decode(message)) async for end, message in messages_of(source, offset, "up")]
    assert b"".join(chunk.payload for _, chunk in came) == CONTENT[offset:]
    assert [chunk.end for _, chunk in came] == [end for end, _ in came]
    assert [chunk.upload for _, chunk in came] == (["up"] + [""] * len(came))[: len(came)]
    for _, chunk in came:
        chunk.require_intact()


async def test_chunks_after_a_break_are_small_at_first_and_large_on_a_line_that_holds(tmp_path):
    path = tmp_path / "source"
    size = 70 * CHUNK_BYTES
    path.touch()
    os.truncate(path, size)
    first = [end async for end, _ in messages_of(path, 0)]
    assert first == list(range(CHUNK_BYTES, size + 1, CHUNK_BYTES))
    again = [10, *[end async for end, _ in messages_of(path, 10)]]
    sizes = [end - begin for begin, end in itertools.pairwise(again)][:-1]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1 << 16, CHUNK_BYTES)
    assert all(size <= max(1 << 16, (end - 10) / 64) for size, end in zip(sizes, again[1:], strict=False))


async def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(bytes(10 * CHUNK_BYTES))
    with pytest.raises(BadChunk, match="was cut at byte"):
        async for _ in messages_of(path, 0):
            os.truncate(path, 0)


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
        async for _, message in messages_of(self.path, request.offset):
            chunk = transfer_pb2.Chunk.FromString(message)
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
        yield servicer, TransferStub(channel)
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
    monkeypatch.setattr(transfer, "STALL_S", 0.1)
    servicer, stub = flaky
    servicer.cut_bytes = 10
    # The second is told where the machine stands still during a try.
    with pytest.raises(Unreachable, match=r"does not answer|has sent no byte for 0\.1 s"):
        await download(stub, digest_of_file(source), len(CONTENT), tmp_path / "got")
    assert not (tmp_path / "got").exists()


async def test_a_missing_file_is_not_asked_for_again(tmp_path, flaky):
    with pytest.raises(NotFound, match="no such file"):
        await download(flaky[1], "blake3:" + "1" * 64, 10, tmp_path / "got")
