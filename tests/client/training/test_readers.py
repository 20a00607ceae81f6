"""What records the formats give: class labels, and lines of JSON."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import zstandard
from datasets import ClassLabel, Dataset, Features, Value

from fedloom_client.jsonlines import numbered_lines
from fedloom_client.training.orders import Source
from fedloom_client.training.records import Records
from fedloom_common.errors import TrainingFailed

SKIPPABLE = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"  # RFC 8878, section 3.1.2: a reader passes it over

FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["happy", "sad"])})


def source(*files: Path, **changes: Any) -> Source:
    defaults: dict[str, Any] = {"format": "jsonl", "fields": {}, "held_out": 0.1}
    return Source(files=tuple(map(str, files)), **(defaults | changes))


def records_of(*files: Path, needs: tuple[str, ...] = (), **changes: Any) -> list[Any]:
    return [row.values for row in Records(source(*files, **changes)).rows(needs)]


def frames(content: bytes) -> bytes:
    """A zstd frame for each 5 bytes, as tools that work in parallel or append write them."""
    pieces = [content[begin : begin + 5] for begin in range(0, len(content), 5)]
    return SKIPPABLE.join(map(zstandard.compress, pieces)) + SKIPPABLE


def save(data: Dataset, path: Path, format_: Any) -> Path:
    if format_ == "parquet":
        data.to_parquet(str(path))
    else:
        data.save_to_disk(str(path))
    return path


@pytest.mark.parametrize("format_", ["parquet", "dataset"])
def test_a_class_label_is_its_name_and_no_label_is_none(tmp_path: Path, format_: Any) -> None:
    data = Dataset.from_dict({"text": ["good", "bad", "?"], "label": [0, 1, -1]}, FEATURES)
    file = save(data, tmp_path / "data", format_)
    assert [record["label"] for record in records_of(file, format=format_)] == ["happy", "sad", None]
    own = records_of(file, needs=("mood",), format=format_, fields={"mood": "label"})
    assert [record["mood"] for record in own] == ["happy", "sad", None]


@pytest.mark.parametrize("format_", ["parquet", "dataset"])
def test_each_file_has_class_labels_of_its_own(tmp_path: Path, format_: Any) -> None:
    first = save(Dataset.from_dict({"text": ["a"], "label": [0]}, FEATURES), tmp_path / "a", format_)
    other = Features({"text": Value("string"), "label": ClassLabel(names=["angry", "happy"])})
    second = save(Dataset.from_dict({"text": ["b"], "label": [0]}, other), tmp_path / "b", format_)
    assert [record["label"] for record in records_of(first, second, format=format_)] == ["happy", "angry"]


def test_a_class_label_without_names_is_its_number(tmp_path: Path) -> None:
    features = Features({"label": ClassLabel(num_classes=3)})
    file = save(Dataset.from_dict({"label": [2, 0]}, features), tmp_path / "data", "dataset")
    assert records_of(file, format="dataset") == [{"label": 2}, {"label": 0}]


def test_a_text_of_json_that_looks_like_a_date_is_a_text(tmp_path: Path) -> None:
    records = [{"source": "Jan 1 2020", "target": "2020-01-01"}, {"source": "now", "target": "12:00:00"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert records_of(tmp_path / "a.jsonl", needs=("source", "target")) == records


def test_lines_may_be_blank_and_end_in_several_ways(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\\ud83d\\ude00"}')
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"a": null}\n'))
    assert records_of(tmp_path / "*.jsonl*") == [{"a": 1}, {"a": "\N{GRINNING FACE}"}, {"a": None}]


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.jsonl.gz", gzip.compress), ("a.jsonl.bz2", bz2.compress), ("a.jsonl.xz", lzma.compress),
     ("a.jsonl.zst", zstandard.compress), ("a.jsonl.zst", lambda content: frames(content))],
)  # fmt: skip
def test_the_lines_within_a_compressed_file_are_read(tmp_path: Path, name: str, compress: Any) -> None:
    (tmp_path / name).write_bytes(compress(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}'))
    assert records_of(tmp_path / name) == [{"a": 1}, {"a": 2}]


def test_a_file_may_be_one_array_of_objects(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"a": 1}, {"a": "x"}], indent=1))
    assert records_of(tmp_path / "a.json") == [{"a": 1}, {"a": "x"}]


def test_a_line_may_leave_out_a_field_that_the_task_can_do_without(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "Hi", "r": "Yo"}\n{"chat": []}\n')
    fields = {"prompt": "q", "response": "r", "messages": "chat"}
    first, second = records_of(tmp_path / "a.jsonl", fields=fields)
    assert (first["prompt"], first["response"], second["messages"]) == ("Hi", "Yo", [])
    with pytest.raises(TrainingFailed, match=r"such as number 2, have no field q: they have chat; name"):
        records_of(tmp_path / "a.jsonl", fields=fields, needs=("prompt",))
    with pytest.raises(TrainingFailed, match=r"such as number 1, have no field text: they have q, r; name"):
        records_of(tmp_path / "a.jsonl", fields={"prompt": "text"})


def test_a_field_that_a_line_leaves_out_is_not_taken_from_one_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"response": "draft", "final": "Yo"}\n{"response": "draft"}\n')
    fields = {"response": "final"}
    assert records_of(tmp_path / "a.jsonl", fields=fields) == [{"response": "Yo", "final": "Yo"}, {}]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        pytest.param(b'{"a": 1}\n\n{"secret": 1', r"line 3 of .*a\.jsonl is not JSON in UTF-8", id="cut"),
        pytest.param(b'{"a": "secret\xff"}', r"line 1 of .*a\.jsonl is not JSON in UTF-8", id="latin"),
        pytest.param(
            b'{"a": "secret\\ud83d"}',
            r"line 1 of .*a\.jsonl has half of a surrogate pair",
            id="half-a-character",
        ),
        pytest.param(b'{"a": 1}\n["secret"]', r"line 2 of .*a\.jsonl is list, wanted a JSON", id="list"),
        pytest.param(b'{"a": 1}\n' + b"[" * 100_000, r"line 2 of .*a\.jsonl is not JSON", id="deep"),
        pytest.param(b'[{"a": 1}, "secret"]', r"item 2 of the array in .*a\.jsonl is str", id="item"),
        pytest.param(b'[{"a": "secret"}', r"the array in .*a\.jsonl is not JSON", id="array"),
    ],
)
def test_a_bad_line_is_named_and_not_quoted(tmp_path: Path, content: bytes, place: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(TrainingFailed, match=place + ".*: mend it, or leave it out") as caught:
        records_of(tmp_path / "a.jsonl")
    assert "secret" not in str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], id="cut"),
        pytest.param("a.jsonl.gz", b"no archive", id="gzip"),
        pytest.param("a.jsonl.bz2", b"no archive", id="bzip2"),
        pytest.param("a.jsonl.xz", b"no archive", id="xz"),
        pytest.param("a.jsonl.zip", b"no archive", id="zip"),
        pytest.param("a.jsonl.zst", b"no archive", id="zstd"),
        pytest.param("a.jsonl.zst", zstandard.compress(b'{"a": 1}\n' * 99)[:-1], id="cut-zstd"),
        pytest.param("a.jsonl.zst", frames(b'{"a": 1}\n')[:-12], id="cut-last-frame"),
        pytest.param("a.jsonl.zst", zstandard.compress(b'{"a": 1}\n') + b"?", id="more-than-zstd"),
        pytest.param("a.jsonl.zst", b"", id="nothing-left"),
    ],
)
def test_a_broken_archive_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingFailed, match=rf"{name} cannot be read: mend it, or leave it out"):
        records_of(tmp_path / name)
    with pytest.raises(OSError, match=name) as caught:  # as the command `fedloom data split` tells it
        list(numbered_lines(tmp_path / name))
    assert caught.value.filename == str(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.txt.gz", gzip.compress(b"to be or not to be" * 99)[:-9], id="cut"),
        pytest.param("a.txt.xz", b"no archive", id="xz"),
        pytest.param("a.txt.zip", b"no archive", id="zip"),
        pytest.param("a.txt.zst", b"no archive", id="zstd"),
        pytest.param("a.txt.zst", zstandard.compress(b"to be or not to be" * 99)[:-1], id="cut-zstd"),
    ],
)
def test_a_broken_archive_of_text_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "0.txt").write_text("to be")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingFailed, match=rf"{name} is not UTF-8 text: mend it, or leave it out"):
        list(Records(source(tmp_path / "*", format="text")).texts())


def test_a_compressed_text_is_read_to_the_end_of_its_last_frame(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(frames(b"to be or not to be"))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"x" * 3_000_000))
    texts = list(Records(source(tmp_path / "*", format="text")).texts())
    assert texts == ["to be or not to be", "x" * 3_000_000]
