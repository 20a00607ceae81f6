import json
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom_common.errors import BadTensor
from fedloom_common.tensors import Manifest, encode_header, read_tensors, write_tensors

TENSORS = {
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 3),
    "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "step": torch.tensor([7], dtype=torch.int64),
    "weight": torch.randn(4, 5).t(),
}


def test_what_is_written_is_what_the_safetensors_library_reads(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, TENSORS, {"note": "x"})
    loaded = safetensors.torch.load_file(path)
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}


def test_what_the_safetensors_library_writes_is_what_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(contiguous, path, metadata={"format": "pt"})
    read = dict(read_tensors(path))
    assert set(read) == set(TENSORS)
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def header_of(content: object, body: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + body


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_FILES = {
    "nothing": (b"", "a header needs 8"),
    "huge-header": (struct.pack("<Q", 1 << 60) + b"{}", "the limit is"),
    "short-header": (struct.pack("<Q", 100) + b"{}", "ends after 2 of 100"),
    "not-json": (struct.pack("<Q", 4) + b"\x80\x04K.", "not JSON"),
    "a-list": (header_of([1]), "not a mapping"),
    "no-shape": (header_of({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "lacks dtype"),
    "odd-dtype": (header_of({"w": ENTRY | {"dtype": "OBJ"}}, bytes(8)), "dtype 'OBJ'"),
    "negative": (header_of({"w": ENTRY | {"shape": [-2]}}, bytes(8)), "are not sizes"),
    "boolean": (header_of({"w": ENTRY | {"shape": [True]}}, bytes(8)), "are not sizes"),
    "wrong-size": (header_of({"w": ENTRY | {"shape": [3]}}, bytes(8)), "needs 12"),
    "many-dimensions": (
        header_of({"w": ENTRY | {"shape": [1 << 61] * 17}}, bytes(8)),
        "more than 16 dimensions",
    ),
    "long-name": (header_of({"w" * 501: ENTRY}, bytes(8)), "a name of 501 characters"),
    "unprintable-name": (header_of({"\ud800": ENTRY}), r"cannot be shown: '\\ud800'"),
    "a-hole": (header_of({"w": ENTRY | {"data_offsets": [8, 16]}}, bytes(16)), "begins at byte"),
    "an-overlap": (header_of({"v": ENTRY, "w": ENTRY}, bytes(16)), "begins at byte"),
    "cut-short": (header_of({"w": ENTRY}, bytes(7)), "its header describes"),
    "surplus": (header_of({"w": ENTRY}, bytes(9)), "its header describes"),
    "odd-metadata": (header_of({"__metadata__": {"a": 1}}), "not a mapping of text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_by_its_header(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(BadTensor, match=message):
        Manifest.read(path)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "file"
    for candidate in (content, struct.pack("<Q", len(content)) + content):
        path.write_bytes(candidate)
        try:
            manifest = Manifest.read(path)
        except BadTensor:
            continue
        assert manifest.size_bytes == len(candidate)


def test_tensors_begin_at_a_multiple_of_eight(tmp_path):
    for name in ("a", "ab", "abc"):
        assert len(encode_header([(name, "F32", (1,))])) % 8 == 0


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"w": torch.ones(2)})
    with pytest.raises(BadTensor, match="complex64"):
        write_tensors(path, {"w": torch.ones(2, dtype=torch.complex64)})
    assert np.array_equal(safetensors.torch.load_file(path)["w"], [1, 1])
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


OTHERS = {
    "missing": ([("a", "F32", (2,))], "tensor b is missing"),
    "shape": ([("a", "F32", (2,)), ("b", "F32", (1,))], r"b has shape \[1\], wanted \[3\]"),
    "dtype": ([("a", "F32", (2,)), ("b", "BF16", (3,))], "b has dtype BF16, wanted F32"),
    "surplus": ([("a", "F32", (2,)), ("b", "F32", (3,)), ("c", "F32", ())], "c is not in the model"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_manifest_that_differs_is_told_by_its_first_tensor(tmp_path, name):
    entries, message = OTHERS[name]
    model = _manifest(tmp_path / "model", [("a", "F32", (2,)), ("b", "F32", (3,))])
    other = _manifest(tmp_path / "other", entries)
    model.require_same_tensors(model)
    with pytest.raises(BadTensor, match=message):
        model.require_same_tensors(other)


def _manifest(path, entries) -> Manifest:
    sizes = {"F32": 4, "BF16": 2}
    total = sum(sizes[dtype] * int(np.prod(shape)) for _, dtype, shape in entries)
    path.write_bytes(encode_header(entries) + bytes(total))
    return Manifest.read(path)


def test_a_header_longer_than_its_file_is_refused_before_memory_is_set_aside(tmp_path):
    path = tmp_path / "short.safetensors"
    path.write_bytes((16 << 20).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(BadTensor, match="the header ends after 2 of 16777216 bytes"):
        Manifest.read(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
