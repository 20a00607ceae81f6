import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fedloom.v1 import transfer_pb2
from fedloom_common.chunks import Chunk
from fedloom_common.errors import BadChunk, FederationError, ProtocolError

chunks = st.builds(
    Chunk,
    payload=st.binary(max_size=400),
    offset=st.integers(0, 2**64 - 1),
    crc32c=st.integers(0, 2**32 - 1),
    upload=st.text(max_size=200),
)


@given(chunks)
def test_the_bytes_are_protobufs(chunk):
    message = transfer_pb2.Chunk(
        upload=chunk.upload, offset=chunk.offset, crc32c=chunk.crc32c, payload=chunk.payload
    )
    assert chunk.encode() == message.SerializeToString()
    assert Chunk.decode(message.SerializeToString()) == chunk


@given(chunks, chunks)
def test_fields_that_come_twice_are_read_as_protobuf_reads_them(first, second):
    message = first.encode() + second.encode()
    wanted = transfer_pb2.Chunk.FromString(message)
    came = Chunk.decode(message)
    assert (came.upload, came.offset, came.crc32c) == (wanted.upload, wanted.offset, wanted.crc32c)
    assert bytes(came.payload) == wanted.payload


@given(st.binary(max_size=300))
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused(message):
    try:
        wanted = transfer_pb2.Chunk.FromString(message)
    except DecodeError:
        with pytest.raises(ProtocolError):
            Chunk.decode(message)
        return
    try:
        came = Chunk.decode(message)
    except FederationError as error:
        pytest.fail(f"protobuf reads {message!r}, we say: {error}")
    assert (came.upload, came.offset, came.crc32c) == (wanted.upload, wanted.offset, wanted.crc32c)
    assert bytes(came.payload) == wanted.payload


def test_a_payload_is_not_copied_when_it_is_read():
    message = Chunk.of(b"x" * 1000, 5, "up").encode()
    payload = Chunk.decode(message).payload
    assert isinstance(payload, memoryview)
    assert payload.obj is message


def test_a_payload_that_differs_from_its_checksum_is_named():
    with pytest.raises(BadChunk, match="the chunk at byte 7 is corrupt: its CRC-32C is"):
        Chunk(payload=b"abc", offset=7, crc32c=1).require_intact()


def test_the_checksum_is_the_castagnoli_crc():
    assert Chunk.of(b"123456789", 0).crc32c == 0xE3069283  # RFC 3720, the check value of CRC-32C
