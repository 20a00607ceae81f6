"""Packing: tokens counted by hand on a tokenizer of single bytes."""

import fcntl
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom_client.training.data import PackedData, pack
from fedloom_client.training.examples import Examples
from fedloom_client.training.orders import Cancelled, Source
from fedloom_client.training.records import Records
from fedloom_client.training.tasks import AnyTask, new_task, packing_key
from fedloom_common.runspec import CausalLM

END = 256


def packed(folder: Path, assets: Path, files: Path, context: int = 8, **changes: Any) -> Path:
    fields: dict[str, Any] = {
        "format": "text",
        "files": (str(files),),
        "fields": {},
        "held_out": 0.25,
    }
    return pack(
        Records(Source(**(fields | changes))), *causal(assets, context), folder, lambda _done, _total: None
    )


def causal(assets: Path, context: int) -> tuple[AnyTask, str]:
    spec = CausalLM.model_construct(context_tokens=context)
    return new_task(spec, assets), packing_key(spec, assets)


def blocks(examples: Examples) -> Any:
    return examples.take(np.arange(len(examples)), {})["input_ids"]


def byte_ids(assets: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(str(assets))(text)["input_ids"]
    assert len(ids) == len(text.encode())
    return ids


def test_the_tail_of_each_file_is_held_out_and_documents_end_with_the_end_token(
    assets: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh")
    (tmp_path / "b.txt").write_text("ABCDEFGHIJKL")
    data = PackedData.open(packed(tmp_path / "data", assets, tmp_path / "*.txt", context=2))
    expected_train = [*byte_ids(assets, "abcdef"), END, *byte_ids(assets, "ABCDEFGHI"), END]
    expected_held_out = [*byte_ids(assets, "gh"), END, *byte_ids(assets, "JKL"), END]
    assert blocks(data.train).flatten().tolist() == expected_train[:16]
    assert blocks(data.held_out).flatten().tolist() == expected_held_out[:6]
    assert blocks(data.train).dtype == np.uint16
    assert data.packed.largest == {"input_ids": END}


def test_records_are_held_out_whole(assets: Path, tmp_path: Path) -> None:
    texts = [f"{number:03}" for number in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    data = PackedData.open(packed(tmp_path / "data", assets, tmp_path / "a.jsonl", context=4, format="jsonl"))

    def documents(examples: Any) -> set[tuple[int, ...]]:
        assert (examples[:, 3] == END).all()
        return {tuple(example[:3]) for example in examples.tolist()}

    train, held_out = documents(blocks(data.train)), documents(blocks(data.held_out))
    assert (len(train), len(held_out)) == (300, 100)
    assert train.isdisjoint(held_out)


def test_runs_with_different_tokenizers_take_turns_and_only_the_last_few_packings_stay(
    assets: Path, tmp_path: Path
) -> None:
    text, folder = tmp_path / "a.txt", tmp_path / "data"
    text.write_text("some text " * 20)
    made = []
    for context in (8, 9, 8, 10, 11):
        made.append(packed(folder, assets, text, context=context))
        time.sleep(0.02)  # the file system's clock tells them apart
    assert made[2] == made[0]
    assert set(folder.iterdir()) == {made[0], made[3], made[4]}


def test_packing_waits_for_another_runs_group_and_hears_a_cancel_meanwhile(
    assets: Path, tmp_path: Path
) -> None:
    text, folder = tmp_path / "a.txt", tmp_path / "data"
    text.write_text("some text " * 20)
    source = Source(format="text", files=(str(text),), fields={}, held_out=0.1)

    def stop(_done: int, _total: int) -> None:
        raise Cancelled

    with (tmp_path / ".data.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Cancelled):
            pack(Records(source), *causal(assets, 8), folder, stop)
    assert packed(folder, assets, text).is_dir()


def test_packing_is_done_once_and_again_when_the_texts_or_the_tokenizer_change(
    assets: Path, tmp_path: Path
) -> None:
    tokenizer = Path(shutil.copytree(assets, tmp_path / "assets"))
    text, folder = tmp_path / "a.txt", tmp_path / "data"
    text.write_text("some text " * 20)
    first = packed(folder, tokenizer, text)
    made = (first / "train/input_ids.bin").stat().st_mtime_ns
    assert packed(folder, tokenizer, text) == first
    assert (first / "train/input_ids.bin").stat().st_mtime_ns == made
    assert packed(folder, tokenizer, text, context=16) != first
    (tokenizer / "special_tokens_map.json").write_text("{}")
    again = packed(folder, tokenizer, text)
    assert again != first
    text.write_text("new text " * 20)
    assert packed(folder, tokenizer, text) != again


def test_packing_is_done_again_by_another_release(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, folder = tmp_path / "a.txt", tmp_path / "data"
    text.write_text("some text " * 20)
    first = packed(folder, assets, text)
    monkeypatch.setattr("fedloom_client.training.tasks.making.version", lambda _: "99.0")
    assert packed(folder, assets, text) != first


def test_an_interrupted_packing_is_not_taken_for_a_finished_one(assets: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 20)
    records = Records(Source(format="text", files=(str(tmp_path / "a.txt"),), fields={}, held_out=0.1))

    def stop(_done: int, _total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        pack(records, *causal(assets, 8), tmp_path / "data", stop)
    result = pack(records, *causal(assets, 8), tmp_path / "data", lambda _done, _total: None)
    assert len(PackedData.open(result).train) == 181 // 8
    assert [path.name for path in (tmp_path / "data").iterdir()] == [result.name]
