"""Files that a peer may send, and why each is refused."""

import json
import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fedloom_common.errors import BadTensor
from fedloom_common.tensors import Manifest

PIECE = 1 << 16
BASE = {"w": torch.ones(2, PIECE), "n": torch.tensor([3])}


def sent(exchange, chain, damage, base=None):
    """An honest file, damaged."""
    base = base or BASE
    trained = {
        name: tensor + tensor.new_tensor(1) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }
    session = exchange(chain, base, trained).encode()
    tensors = {name: tensor.copy() for name, tensor in load_file(session.encoded).items()}
    with safe_open(session.encoded, "np") as file:
        metadata = file.metadata()
    damage(tensors, metadata)
    save_file(tensors, session.encoded, metadata)
    return session


def put(name, place, value):
    def damage(tensors, metadata):
        tensors[name].reshape(-1)[place] = value

    return damage


def replace(name, tensor):
    return lambda tensors, metadata: tensors.update({name: tensor})


def drop(name):
    return lambda tensors, metadata: tensors.pop(name)


def tell(key, value):
    return lambda tensors, metadata: metadata.update({key: value})


TOPK, INT8_ZSTD, BF16_ZSTD = {"name": "topk", "fraction": 0.25}, ["int8", "zstd"], ["bf16", "zstd"]
BAD_FILES = {
    "another-codec": ("int8", tell("fedloom.codec", '[{"name":"int4","block":64}]'), "int4.*wanted .*int8"),
    "another-block": ("int8", tell("fedloom.codec", '[{"name":"int8","block":64}]'), "codec is"),
    "no-codec": ("int8", lambda tensors, metadata: metadata.pop("fedloom.codec"), "codec is not told"),
    "codec-not-json": ("int8", tell("fedloom.codec", "["), "codec is"),
    "codec-nested-deep": ("int8", tell("fedloom.codec", "[" * 100_000), "codec is"),
    "another-base": ("int8", tell("fedloom.base", "blake3:00"), "base model is blake3:00, wanted blake3:ab"),
    "no-base": ("int8", lambda tensors, metadata: metadata.pop("fedloom.base"), "base model is not told"),
    "no-scale": ("int8", drop("w.scale"), "w.scale is missing"),
    "surplus": ("int8", replace("w.q2", np.zeros(1)), "w.q2 is not one"),
    "wrong-shape": ("int8", replace("w.q", np.zeros((PIECE, 2), np.int8)), r"wanted \[2, 65536\]"),
    "wrong-type": ("int8", replace("w.q", np.zeros((2, PIECE), np.uint8)), "w.q has dtype U8, wanted I8"),
    "too-large": ("int4", replace("w.q", np.zeros(2 * PIECE, np.uint8)), "w.q has shape"),
    "carried-wrong": ("int4", replace("n", np.zeros(2, np.int64)), "n has shape"),
    "scale-nan": ("int8", put("w.scale", 300, math.nan), "w: a scale is nan"),
    "scale-infinite": ("int4", put("w.scale", 0, math.inf), "w: a scale is inf"),
    "scale-negative": ("int8", put("w.scale", 0, -1.0), "w: a scale is -1"),
    "beyond-fp32": ("int8", put("w.scale", 0, 3e38), r"w: would hold inf at index \[0, 0\]"),
    "fp16-nan": ("fp16", put("w", PIECE + 5, math.nan), "w: a value is nan"),
    "topk-value-infinite": ([TOPK], put("w.value", 7, -math.inf), "w: a value is inf"),
    "gap-beyond": ([TOPK], put("w.gap", 9, 65535), "w: the gaps lead to value"),
    "more-kept-than-there": ([TOPK], put("w.count", 0, PIECE + 1), "w: a piece keeps 65537 values"),
    "kept-do-not-add-up": ([TOPK], put("w.count", 0, 5), "w: its pieces keep"),
    "count-missing": ([TOPK], drop("w.count"), "w.count is missing"),
    "count-short": ([TOPK], replace("w.count", np.zeros(1, np.uint32)), "w.count has shape"),
    "frames-do-not-add-up": (BF16_ZSTD, put("w.frames", 0, 4), "w: its frames have"),
    "frames-short": (BF16_ZSTD, replace("w.frames", np.zeros(3, np.uint32)), r"shape \[3\], wanted \[4\]"),
    "not-zstd": (INT8_ZSTD, put("w.zstd", slice(0, 4), 0), "w: a zstd frame cannot be read"),
    "payload-too-large": (INT8_ZSTD, replace("w.zstd", np.zeros(PIECE * 3, np.uint8)), "w.zstd has shape"),
    "payload-not-flat": (INT8_ZSTD, replace("w.zstd", np.zeros((1, 9), np.uint8)), "w.zstd has shape"),
    "payload-empty": (INT8_ZSTD, replace("w.zstd", np.zeros(0, np.uint8)), "w: its frames have"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_the_tensor_and_the_reason(exchange, name):
    chain, damage, message = BAD_FILES[name]
    session = sent(exchange, chain, damage)
    with pytest.raises(BadTensor, match=message):
        session.check()


@pytest.mark.parametrize(
    "chain", ["int8", "int4", "fp16", [TOPK], ["int8", "zstd"], [TOPK, "int4", "zstd"]], ids=str
)
def test_every_chain_passes_undamaged(exchange, chain):
    session = sent(exchange, chain, lambda tensors, metadata: None)
    session.check()
    assert session.changes()["w"].max() == pytest.approx(1, rel=1e-3)


def reframed(frame, plane=0):
    """Put another frame in the place of one of bf16's."""

    def damage(tensors, metadata):
        sizes, payload = tensors["w.frames"], tensors["w.zstd"].tobytes()
        start, end = int(sizes[:plane].sum()), int(sizes[: plane + 1].sum())
        tensors["w.zstd"] = np.frombuffer(payload[:start] + frame + payload[end:], np.uint8)
        sizes[plane] = len(frame)

    return damage


def header(content_bytes, window=0x88):
    """A zstd frame's header (RFC 8878, 3.1.1.1) with an 8-byte content size, and one empty last block."""
    return struct.pack("<IBBQ", 0xFD2FB528, 0xC0, window, content_bytes) + b"\x01\x00\x00"


FRAMES = {
    "claims-a-terabyte": (header(1 << 40), "says that it holds 1099511627776 bytes, wanted 65536"),
    "too-little": (zstandard.compress(bytes(PIECE - 1)), "says that it holds 65535 bytes"),
    "a-bomb": (zstandard.compress(bytes(1 << 26)), "says that it holds 67108864 bytes"),
    "a-lie": (header(PIECE), "cannot be read"),
    "no-size": (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(PIECE)), "holds -1 bytes"),
    "a-window-of-a-gigabyte": (header(PIECE, window=20 << 3), "cannot be read"),
    "more-behind": (zstandard.compress(bytes(PIECE)) + b"more", "cannot be read"),
    "a-skippable-frame": (struct.pack("<II", 0x184D2A50, 4) + b"more", "says that it holds 0 bytes"),
    "nothing": (b"", "cannot be read"),
    "larger-than-it-can-be": (bytes(PIECE + 400), "65936 bytes, too many for the 65536"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_gets_no_more_memory_than_the_model_says(exchange, name):
    frame, message = FRAMES[name]
    session = sent(exchange, BF16_ZSTD, reframed(frame))
    tracemalloc.start()
    try:
        with pytest.raises(BadTensor, match=message) as refusal:
            session.check()
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert str(refusal.value).startswith("tensor w: ")


def test_half_precision_weights_stay_within_their_range(exchange):
    base = {"w": torch.tensor([64000.0, 1.0], dtype=torch.float16)}

    def damage(tensors, metadata):
        tensors["w.scale"][:] = 20.0  # 127 of these on top of 64,000 are more than half precision holds
        tensors["w.q"][:] = 127

    session = sent(exchange, "int8", damage, base)
    with pytest.raises(BadTensor, match=r"w: would hold 66540.0 at index \[0\], wanted finite F16 values"):
        session.check()


def test_a_finite_change_may_not_carry_a_finite_weight_to_infinity(exchange):
    def damage(tensors, metadata):
        tensors["w.scale"][:] = 1e36
        tensors["w.q"][:] = 127

    session = sent(exchange, "int8", damage, {"w": torch.tensor([3.3e38])})
    with pytest.raises(BadTensor, match=r"w: would hold inf at index \[0\], wanted finite F32 values"):
        session.check()


def test_a_large_change_that_stays_in_range_is_accepted(exchange):
    base = {"w": torch.tensor([64000.0, 1.0], dtype=torch.float16)}

    def damage(tensors, metadata):
        tensors["w.scale"][:] = 3.0
        tensors["w.q"][:] = 127

    session = sent(exchange, "int8", damage, base)
    session.check()
    assert session.decode()["w"].tolist() == [64384.0, 382.0]  # half precision goes by 32s there: 64,381


def test_a_codec_whose_parts_would_take_another_tensors_name_is_refused(exchange):
    base = {"w": torch.ones(4), "w.q": torch.tensor([1])}
    with pytest.raises(BadTensor, match=r"codec int8 would give two tensors the name w.q"):
        exchange("int8", base, base).encode()
    exchange("bf16", base, base).encode().check()


def test_a_foreign_clients_json_may_be_written_its_own_way(exchange):
    spaced = json.dumps([{"block": 256, "name": "int8"}], indent=3)
    session = sent(exchange, "int8", tell("fedloom.codec", spaced))
    session.check()
    np.testing.assert_allclose(session.decode()["w"], BASE["w"] + 1, rtol=1e-6)


def test_an_update_that_is_sent_as_it_is_needs_no_metadata(exchange):
    session = sent(exchange, "fp32", lambda tensors, metadata: metadata.clear())
    session.check()
    np.testing.assert_array_equal(session.decode()["w"], BASE["w"] + 1)


def test_a_header_that_grew_is_padded_with_spaces(exchange):
    session = exchange(["bf16", "zstd"], BASE, BASE).encode()
    content = session.encoded.read_bytes()
    text = content[8 : 8 + struct.unpack("<Q", content[:8])[0]]
    assert text.rstrip(b" ").endswith(b"}")
    assert len(text) > len(text.rstrip(b" "))
    assert Manifest.read(session.encoded).size_bytes == len(content)
