"""The command, on files of every format, and what sites then read of what it made."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fedloom_client.splitting.cli import app
from fedloom_common.errors import BadSpec

ROWS = [
    {"text": "to be", "ward": "Icu", "label": "pos"},
    {"text": "or not", "ward": "Surgery", "label": "neg"},
    {"text": "to bé", "ward": "Icu", "label": "neg"},
    {"text": "that is", "ward": "Icu", "label": "pos"},
    {"text": "the question", "ward": "Surgery", "label": "neg"},
]


def split(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["split", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS) + "\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_go_to_the_site_of_their_column_unchanged_and_in_order(lines, tmp_path):
    output = split(lines, "--by-column", "ward", "--label", "label", "--to", tmp_path / "sites")
    assert (tmp_path / "sites/icu/data/data.jsonl").read_text() == "".join(
        json.dumps(ROWS[n], ensure_ascii=False) + "\n" for n in (0, 2, 3)
    )
    assert read(tmp_path / "sites/surgery/data/data.jsonl") == [ROWS[1], ROWS[4]]
    table = [line.split() for line in output.splitlines()]
    # of all 2 are pos and 3 neg; icu has 2/3 pos: ½(|2/3 − 2/5| + |1/3 − 3/5|) = 4/15
    assert table[3][:3] == ["icu", "3", "60.0%"]
    assert table[3][-5:] == ["pos", "67%,", "neg", "33%", "0.267"]
    assert table[4][-3:] == ["neg", "100%", "0.400"]
    assert "average: 0.320" in output  # 3/5 · 4/15 + 2/5 · 2/5
    assert "format: jsonl, files: [data/data.jsonl]" in output


def test_the_manifest_tells_how_to_make_the_split_again(lines, tmp_path):
    split(lines, "--iid", "--sizes", "0.6,0.4", "--seed", "3", "--label", "label", "--to", tmp_path / "a")
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert manifest["rule"] == {
        "iid": True, "sites": None, "sizes": "0.6,0.4", "label": "label", "at_least": None, "seed": 3,
    }  # fmt: skip
    assert manifest["inputs"][0]["path"] == str(lines)
    assert manifest["inputs"][0]["files"]["notes.jsonl"].startswith("blake3:")
    assert {name: site["examples"] for name, site in manifest["sites"].items()} == {"site-1": 3, "site-2": 2}
    split(lines, "--iid", "--sizes", "0.6,0.4", "--seed", "3", "--to", tmp_path / "b")
    for site in ("site-1", "site-2"):
        again = (tmp_path / "b" / site / "data/data.jsonl").read_bytes()
        assert (tmp_path / "a" / site / "data/data.jsonl").read_bytes() == again


def test_parquet_stays_parquet_with_its_columns_in_order(tmp_path):
    table = pa.table({"n": list(range(20000)), "even": [n % 2 == 0 for n in range(20000)]})
    pq.write_table(table.slice(0, 9000), tmp_path / "1.parquet")
    pq.write_table(table.slice(9000), tmp_path / "2.parquet")
    split(tmp_path / "*.parquet", "--by-column", "even", "--to", tmp_path / "sites")
    evens = pq.read_table(tmp_path / "sites/true/data/data.parquet")
    assert evens.schema.equals(table.schema)
    assert evens.column("n").to_pylist() == list(range(0, 20000, 2))
    assert pq.read_table(tmp_path / "sites/false/data/data.parquet").num_rows == 10000


def test_files_whose_names_are_no_utf_8_are_split_too(tmp_path):
    for name in (b"caf\xe9.txt", b"bar.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("x")
    split(tmp_path / "*.txt", "--by-file", "--to", tmp_path / "sites")
    assert "caf\\udce9.txt" in (tmp_path / "sites/manifest.json").read_text()


def test_a_saved_dataset_is_split_by_the_names_of_its_classes(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value, load_from_disk

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    output = split(tmp_path / "saved", "--by-column", "label", "--to", tmp_path / "sites")
    assert "Saving the dataset" not in output
    made = load_from_disk(str(tmp_path / "sites/pos/data/saved"))
    assert made["text"][:] == ["a", "c"]
    assert made.features == features
    assert load_from_disk(str(tmp_path / "sites/neg/data/saved"))["text"][:] == ["b"]


def test_the_manifest_tells_the_files_of_splits_apart(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["a", "b"]})
    DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "saved"))
    split(tmp_path / "saved", "--iid", "--sites", "2", "--to", tmp_path / "sites")
    [told] = json.loads((tmp_path / "sites/manifest.json").read_text())["inputs"]
    name = "data-00000-of-00001.arrow"
    assert told["files"].keys() == {f"train/{name}", f"test/{name}"}


def test_a_directory_that_holds_no_train_is_refused(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict(test=Dataset.from_dict({"text": ["a"]})).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "empty").mkdir()
    for name, message in (("splits", "holds the splits test and no train"), ("empty", "datasets library")):
        with pytest.raises(BadSpec, match=message):
            split(tmp_path / name, "--iid", "--sites", "1", "--to", tmp_path / "sites")


def test_text_files_are_split_by_file_and_keep_their_bytes(tmp_path):
    for folder, name, text in (("x", "hamlet", "to be"), ("x", "lear", "nothing"), ("y", "hamlet", "or not")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.txt").write_text(text)
    split(tmp_path / "*/*.txt", "--by-file", "--to", tmp_path / "each")
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == [
        "hamlet", "hamlet-2", "lear", "manifest.json",
    ]  # fmt: skip
    assert (tmp_path / "each/hamlet-2/data/hamlet.txt").read_text() == "or not"
    split(tmp_path / "*/hamlet.txt", "--iid", "--sites", "1", "--to", tmp_path / "one")
    files = sorted((tmp_path / "one/site-1/data").iterdir())
    assert [file.read_text() for file in files] == ["or not", "to be"]  # hamlet-2.txt, hamlet.txt


def test_a_sites_config_takes_what_the_split_made(lines, tmp_path):
    from datasets import load_dataset

    from fedloom_client.config import DataSource

    split(lines, "--dirichlet", "1", "--label", "label", "--sites", "2", "--to", tmp_path / "sites")
    seen = []
    for site in ("site-1", "site-2"):
        data = json.loads((tmp_path / "sites/manifest.json").read_text())["data"]
        files = [str(tmp_path / "sites" / site / pattern) for pattern in data["files"]]
        source = DataSource(format=data["format"], files=files)
        rows = load_dataset("json", data_files=list(source.files), split="train", streaming=True)
        seen += [row["text"] for row in rows]
    assert sorted(seen) == sorted(row["text"] for row in ROWS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --by-column, --by-file"),
        (["--iid", "--by-file"], "give one of --by-column, --by-file"),
        (["--by-column", "town"], "line 1 of .* has no column town: it has label, text, ward"),
        (["--dirichlet", "1", "--sites", "2"], "--dirichlet needs --label"),
        (["--dirichlet", "inf", "--label", "label", "--sites", "2"], "--dirichlet is inf: wanted a number"),
        (["--dirichlet", "nan", "--label", "label", "--sites", "2"], "--dirichlet is nan: wanted a number"),
        (["--iid"], "--iid needs --sites"),
        (["--iid", "--sizes", "0.5,0.6"], "add up to 1"),
        (["--iid", "--sizes", "half"], "wanted shares such as"),
        (["--iid", "--sizes", "0.5,0.5", "--sites", "3"], "drop one of both"),
        (["--by-file", "--sizes", "1"], "--sizes goes with --iid alone"),
        (["--by-file", "--at-least", "2"], "--at-least goes with --dirichlet alone"),
        (["--iid", "--sites", "6"], "of 5 records site 6 of 6 would get none"),
        (["--iid", "--sites", "1", "--format", "csv"], "--format is csv"),
    ],
)
def test_wrong_input_is_told_and_nothing_is_made(lines, tmp_path, arguments, message):
    with pytest.raises(BadSpec, match=message):
        split(lines, *arguments, "--to", tmp_path / "sites")
    assert not (tmp_path / "sites").exists()


def test_a_files_mark_of_utf_8_stays_behind(tmp_path):
    mark = "\N{ZERO WIDTH NO-BREAK SPACE}"
    for name, row in (("a", ROWS[0]), ("b", ROWS[1])):
        (tmp_path / f"{name}.jsonl").write_text(mark + json.dumps(row) + "\n")
    split(tmp_path / "*.jsonl", "--iid", "--sites", "1", "--to", tmp_path / "sites")
    assert read(tmp_path / "sites/site-1/data/data.jsonl") == ROWS[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .*bad.jsonl is not JSON"),
        ("[1]", "line 2 of .*bad.jsonl is list, wanted a JSON object"),
        ('{"ward": ["a"]}', "record 2 holds list in column ward"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"ward": "a"}\n' + line + "\n")
    with pytest.raises(BadSpec, match=message):
        split(path, "--by-column", "ward", "--to", tmp_path / "sites")


def test_a_folder_that_has_something_in_it_is_left_alone(lines, tmp_path):
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites/mine").write_text("precious")
    with pytest.raises(BadSpec, match="not an empty folder"):
        split(lines, "--iid", "--sites", "2", "--to", tmp_path / "sites")
    assert [path.name for path in (tmp_path / "sites").iterdir()] == ["mine"]


def test_names_that_tell_no_format_ask_for_it(tmp_path):
    (tmp_path / "notes.dat").write_text("hello")
    with pytest.raises(BadSpec, match="give --format"):
        split(tmp_path / "notes.dat", "--iid", "--sites", "1", "--to", tmp_path / "sites")
    with pytest.raises(BadSpec, match="no file matches"):
        split(tmp_path / "*.nothing", "--iid", "--sites", "1", "--to", tmp_path / "sites")


def test_the_working_directory_is_no_folder_to_make(lines, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(BadSpec, match="is the working directory: give --to a folder in it"):
        split(lines, "--iid", "--sites", "2", "--to", ".")


def test_an_empty_folder_behind_a_link_takes_the_sites(lines, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    split(lines, "--iid", "--sites", "2", "--to", tmp_path / "link")
    made = {path.name for path in (tmp_path / "disk").iterdir()}
    assert made == {"manifest.json", "site-1", "site-2"}


def test_half_a_character_in_a_label_is_told_as_json_writes_it(tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"label": "\\ud83d"}\n{"label": "é"}\n')
    output = split(
        tmp_path / "notes.jsonl", "--by-column", "label", "--label", "label", "--to", tmp_path / "sites"
    )
    assert r"\ud83d" in output
    sites = json.loads((tmp_path / "sites/manifest.json").read_text())["sites"]
    assert {name: site["labels"] for name, site in sites.items()} == {
        "ud83d": {r"\ud83d": 1},
        "site": {"é": 1},
    }
