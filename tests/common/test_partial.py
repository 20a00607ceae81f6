import asyncio
import dataclasses
import errno
import os
import time

import pytest
from blake3 import blake3

from fedloom_common.chunks import CHUNK_BYTES, Chunk
from fedloom_common.errors import BadChunk, StorageFull
from fedloom_common.partial import PartialFile, discard, held_bytes, overwrite
from fedloom_common.spares import Spares

CONTENT = os.urandom(9 * CHUNK_BYTES + 12345)
DIGEST = f"blake3:{blake3(CONTENT).hexdigest()}"
OTHER_DIGEST = "blake3:" + "0" * 64


def chunk_at(offset: int, size: int, **changes) -> Chunk:
    payload = CONTENT[offset : offset + size]
    return dataclasses.replace(Chunk.of(payload, offset), **changes)


async def test_a_partial_file_is_taken_up_after_a_crash(tmp_path):
    digest = DIGEST
    first = PartialFile(tmp_path / "part", len(CONTENT), digest)
    await first.add(chunk_at(0, 1000))
    await first.add(chunk_at(1000, 77))
    await first.close()
    second = PartialFile(tmp_path / "part", len(CONTENT), digest)
    assert second.offset == 1077
    for offset in range(1077, len(CONTENT), CHUNK_BYTES):
        await second.add(chunk_at(offset, CHUNK_BYTES))
    await second.finish()
    await second.close()
    assert (tmp_path / "part").read_bytes() == CONTENT


BAD_CHUNKS = {
    "corrupt": (chunk_at(0, 100, payload=b"x" * 100), "is corrupt"),
    "gap": (chunk_at(100, 100), "begins at byte 100, wanted 0"),
    "oversized": (chunk_at(0, CHUNK_BYTES + 1), "the limit is"),
    "past-the-end": (Chunk.of(b"y" * 600, 0), "the file has 500"),
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
async def test_a_bad_chunk_is_refused_and_leaves_no_trace(tmp_path, name):
    chunk, message = BAD_CHUNKS[name]
    size = 500 if name == "past-the-end" else len(CONTENT)
    partial = PartialFile(tmp_path / "part", size, DIGEST)
    with pytest.raises(BadChunk, match=message):
        await partial.add(chunk)
        await partial.finish()
    await partial.close()
    assert (tmp_path / "part").stat().st_size == 0


async def test_a_wrong_digest_empties_the_file(tmp_path):
    partial = PartialFile(tmp_path / "part", 100, OTHER_DIGEST)
    await partial.add(chunk_at(0, 100))
    with pytest.raises(BadChunk, match="send it again from byte 0"):
        await partial.finish()
    await partial.close()
    assert (tmp_path / "part").stat().st_size == 0


async def test_a_short_file_is_not_finished(tmp_path):
    partial = PartialFile(tmp_path / "part", 100, DIGEST)
    await partial.add(chunk_at(0, 99))
    with pytest.raises(BadChunk, match="ends after 99 of 100"):
        await partial.finish()
    await partial.close()


async def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    partial = PartialFile(tmp_path / "part", 100, DIGEST)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageFull, match=r"no space left for 100 bytes in .*: free some"):
        await partial.add(chunk_at(0, 100))
        await partial.finish()
    await partial.close()


async def test_what_came_before_a_corrupt_chunk_stays(tmp_path):
    partial = PartialFile(tmp_path / "part", len(CONTENT), DIGEST)
    with pytest.raises(BadChunk, match="at byte 2000 is corrupt"):
        for offset in (0, 1000, 2000, 3000):
            await partial.add(chunk_at(offset, 1000, **({"crc32c": 1} if offset == 2000 else {})))
        await partial.finish()
    await partial.close()
    assert (tmp_path / "part").read_bytes() == CONTENT[:2000]


async def test_all_that_came_is_written_when_a_stream_breaks(tmp_path):
    partial = PartialFile(tmp_path / "part", len(CONTENT), DIGEST)
    for place in range(9):
        await partial.add(chunk_at(place * CHUNK_BYTES, CHUNK_BYTES))
    await partial.close()
    assert (tmp_path / "part").read_bytes() == CONTENT[: 9 * CHUNK_BYTES]


async def test_a_cancelled_add_does_not_close_the_file_under_the_writing_thread(tmp_path, monkeypatch):
    really_pwrite = os.pwrite

    def slow(*arguments: object) -> int:
        time.sleep(0.05)
        return really_pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", slow)
    partial = PartialFile(tmp_path / "part", len(CONTENT), DIGEST)

    async def fill() -> None:
        for place in range(9):
            await partial.add(chunk_at(place * CHUNK_BYTES, CHUNK_BYTES))

    filling = asyncio.create_task(fill())
    await asyncio.sleep(0.02)
    filling.cancel()
    await asyncio.wait([filling])
    await partial.close()
    held = (tmp_path / "part").read_bytes()
    assert held == CONTENT[: len(held)]
    assert len(held) % CHUNK_BYTES == 0
    assert held


async def test_a_file_that_is_cancelled_while_it_closes_is_closed_with_what_has_come(tmp_path):
    file = PartialFile(tmp_path / "part", len(CONTENT), DIGEST)
    await file.add(chunk_at(0, 1000))
    closing = asyncio.create_task(file.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert file._file.closed
    assert (tmp_path / "part").read_bytes() == CONTENT[:1000]


@pytest.fixture
async def overwriting(tmp_path):
    """A file that is to arrive where a larger one lies."""
    (tmp_path / "spare").write_bytes(b"\xaa" * (len(CONTENT) + 999))
    overwrite(tmp_path / "spare", tmp_path / "part")
    return tmp_path / "part"


async def test_a_file_that_overwrites_another_is_taken_up_where_it_broke_off(overwriting):
    assert held_bytes(overwriting) == 0
    first = PartialFile(overwriting, len(CONTENT), DIGEST)
    await first.add(chunk_at(0, 1000))
    await first.close()
    assert held_bytes(overwriting) == 1000
    second = PartialFile(overwriting, len(CONTENT), DIGEST)
    assert second.offset == 1000
    for offset in range(1000, len(CONTENT), CHUNK_BYTES):
        await second.add(chunk_at(offset, CHUNK_BYTES))
    await second.finish()
    await second.close()
    assert overwriting.read_bytes() == CONTENT
    assert held_bytes(overwriting) == len(CONTENT)
    assert [path.name for path in overwriting.parent.iterdir()] == ["part"]


async def test_a_wrong_digest_leaves_nothing_of_the_file_that_was_overwritten(overwriting):
    partial = PartialFile(overwriting, 100, OTHER_DIGEST)
    await partial.add(chunk_at(0, 100))
    with pytest.raises(BadChunk, match="send it again from byte 0"):
        await partial.finish()
    await partial.close()
    assert held_bytes(overwriting) == 0
    assert overwriting.read_bytes() == b""


def test_what_is_discarded_is_gone(tmp_path):
    (tmp_path / "spare").write_bytes(b"old")
    overwrite(tmp_path / "spare", tmp_path / "part")
    discard(tmp_path / "part")
    discard(tmp_path / "part")
    assert list(tmp_path.iterdir()) == []


def test_no_more_spares_are_kept_than_may_be(tmp_path):
    spares = Spares(tmp_path / "spares", most=2)
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
        spares.keep(tmp_path / name)
    assert not (tmp_path / "c").exists()
    taken = spares.take()
    assert taken is not None
    taken.replace(tmp_path / "taken")
    assert len(list((tmp_path / "spares").iterdir())) == 1
    spares.clear()
    assert spares.take() is None


async def test_a_mark_that_a_crash_has_cut_short_lets_the_file_begin_again(tmp_path):
    (tmp_path / "spare").write_bytes(bytes(len(CONTENT)))
    overwrite(tmp_path / "spare", tmp_path / "part")
    (tmp_path / ".part.held").write_bytes(b"")
    assert held_bytes(tmp_path / "part") == 0
    partial = PartialFile(tmp_path / "part", len(CONTENT), DIGEST)
    for offset in range(0, len(CONTENT), CHUNK_BYTES):
        await partial.add(chunk_at(offset, CHUNK_BYTES))
    await partial.finish()
    await partial.close()
    assert (tmp_path / "part").read_bytes() == CONTENT
