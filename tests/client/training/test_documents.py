"""The site's files as texts: real files of every format, and what is wrong with bad ones."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from fedloom_client.training.documents import PIECE_CHARACTERS, Piece, documents
from fedloom_client.training.orders import Source
from fedloom_client.training.records import Records, held_out_records
from fedloom_common.errors import TrainingFailed

TEXTS = [f"document {number}" for number in range(30)]


def source(*files: Path | str, **changes: Any) -> Source:
    defaults: dict[str, Any] = {"format": "text", "fields": {}, "held_out": 0.1}
    return Source(files=tuple(map(str, files)), **(defaults | changes))


def pieces_of(source: Source) -> list[Piece]:
    return list(documents(Records(source)))


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_each_text_file_is_one_document_even_an_empty_or_oddly_named_one(tmp_path: Path) -> None:
    for name, text in {"a[1]*.txt": "first\nlines\n", "b.txt": "", "c.txt": "last"}.items():
        (tmp_path / name).write_text(text)
    pieces = pieces_of(source(tmp_path / "*.txt"))
    assert [(piece.text, piece.ends_document) for piece in pieces] == [
        ("first\nlines\n", True),
        ("last", True),
    ]


def test_a_long_text_is_cut_after_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(60_000)) + "x" * (PIECE_CHARACTERS + 5)
    (tmp_path / "long.txt").write_text(text)
    records = Records(source(tmp_path / "long.txt"))
    pieces = list(documents(records))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[0].text.endswith("\n")
    assert max(len(piece.text) for piece in pieces) <= PIECE_CHARACTERS
    assert pieces[-1].done == records.total


@pytest.mark.parametrize("format_", ["jsonl", "parquet", "dataset"])
def test_every_record_format_gives_the_same_documents(tmp_path: Path, format_: Any) -> None:
    data = Dataset.from_dict({"body": TEXTS, "other": list(range(30))})
    if format_ == "jsonl":
        file = write_jsonl(tmp_path / "data", [{"body": text, "other": 1} for text in TEXTS])
    elif format_ == "parquet":
        file = tmp_path / "data"
        data.to_parquet(str(file))
    else:
        file = tmp_path / "data"
        DatasetDict({"train": data}).save_to_disk(str(file))
    pieces = pieces_of(source(file, format=format_, fields={"text": "body"}))
    assert [piece.text for piece in pieces] == TEXTS
    held_out = [piece.held_out for piece in pieces]
    assert [sum(map(bool, held_out[start : start + 10])) for start in (0, 10, 20)] == [1, 1, 1]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5])
def test_held_out_records_are_their_share_and_spread_over_all(share: float) -> None:
    held = list(islice(held_out_records(share), 10_000))
    assert held == list(islice(held_out_records(share), 10_000))
    assert sum(held) == pytest.approx(10_000 * share, rel=0.2)
    for start in range(0, 10_000, 1000):
        assert sum(held[start : start + 1000]) == pytest.approx(1000 * share, rel=0.3)


def test_the_fingerprint_follows_the_files_and_the_way_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = Records(source(file)).fingerprint()
    assert Records(source(file)).fingerprint() == first
    assert Records(source(file, held_out=0.2)).fingerprint() != first
    file.write_text("other")
    assert Records(source(file)).fingerprint() != first


@pytest.mark.parametrize(
    ("name", "content", "format_", "message"),
    [
        pytest.param(
            "b.txt", b"\xff\xfe\x00", "text", r"b\.txt is not UTF-8 text: .*leave it out.*\n.*0xff", id="text"
        ),
        pytest.param("b.jsonl", b'{"text": "x"\n', "jsonl", r"line 1 of .*b\.jsonl is not JSON", id="jsonl"),
        pytest.param("b.parquet", b"PAR0", "parquet", r"b\.parquet is not Parquet", id="parquet"),
    ],
)
def test_an_unreadable_file_is_named_among_good_ones(
    tmp_path: Path, name: str, content: bytes, format_: Any, message: str
) -> None:
    good = tmp_path / ("a" + Path(name).suffix)
    if format_ == "parquet":
        Dataset.from_dict({"text": ["good"]}).to_parquet(str(good))
    else:
        good.write_text('{"text": "good"}\n')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingFailed, match=message):
        pieces_of(source(tmp_path / ("*" + Path(name).suffix), format=format_))


def test_a_missing_field_names_the_fields_there_are(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "title": "y"}])
    with pytest.raises(TrainingFailed, match="no field text: they have body, title; name the one"):
        pieces_of(source(file, format="jsonl"))


def test_a_field_that_holds_no_text_names_the_record(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": None}])
    with pytest.raises(
        TrainingFailed, match=r"record 2 of .*a\.jsonl holds NoneType in field text, wanted text"
    ):
        pieces_of(source(file, format="jsonl"))


def test_a_glob_without_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(TrainingFailed, match=r"no file matches .*\*\.txt: correct the data set's files"):
        Records(source(tmp_path / "*.txt"))


def test_a_saved_dataset_without_a_train_split_names_its_splits(tmp_path: Path) -> None:
    DatasetDict({"test": Dataset.from_dict({"text": ["x"]})}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(TrainingFailed, match="holds the splits test and no train"):
        pieces_of(source(tmp_path / "saved", format="dataset"))


def test_a_folder_that_is_no_saved_dataset_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingFailed, match="empty is not a directory that the datasets library saved"):
        pieces_of(source(tmp_path / "empty", format="dataset"))
