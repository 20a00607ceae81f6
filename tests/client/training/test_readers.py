"""What records the formats give: class labels, and lines of JSON."""

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedloom_client.training.orders import Source
from fedloom_client.training.records import Records

FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["happy", "sad"])})


def source(*files: Path, **changes: Any) -> Source:
    defaults: dict[str, Any] = {"format": "jsonl", "fields": {}, "held_out": 0.1}
    return Source(files=tuple(map(str, files)), **(defaults | changes))


def records_of(*files: Path, needs: tuple[str, ...] = (), **changes: Any) -> list[Any]:
    return [row.values for row in Records(source(*files, **changes)).rows(needs)]


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
