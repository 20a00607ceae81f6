"""What docs/tasks.md shows works as shown."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedloom_client.training.tasks import new_task
from fedloom_common.runspec import RunSpec, TaskKind

PAGE = (Path(__file__).parents[2] / "docs/tasks.md").read_text()
FAMILY = {"classification": "bert", "seq2seq": "t5", "instruction": "gpt2"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def shown_tasks() -> list[dict[str, Any]]:
    specs = [yaml.safe_load(block) for block in blocks("yaml")]
    return [spec["task"] for spec in specs if "task" in spec]


def test_every_task_has_its_section_and_specs_are_right() -> None:
    fields = {"name": "x", "model": {"path": "/m"}, "data": "x", "rounds": 1, "local": {"steps": 1}}
    kinds = {RunSpec.model_validate(fields | {"task": task}).task.kind for task in shown_tasks()}
    assert kinds == {*TaskKind.__args__, "plugin"}


ON_RECORDS = [task for task in shown_tasks() if task["kind"] in FAMILY]


@pytest.mark.parametrize("task", ON_RECORDS, ids=lambda task: task["kind"])
def test_the_records_shown_are_examples_of_their_task(
    new_run: Callable[..., Any], task: dict[str, Any]
) -> None:
    config = {
        "gpt2": {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 1024},
        "bert": {
            "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "intermediate_size": 8,
        },
        "t5": {"model_type": "t5", "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1},
    }[FAMILY[task["kind"]]]  # fmt: skip
    run = new_run(FAMILY[task["kind"]], task, model={"config": config})
    section = PAGE.split(f"kind: {task['kind']}")[1].split("\n## ")[0]
    [shown] = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
    records = [json.loads(line) for line in shown.splitlines()]
    made = new_task(run.spec.task, run.assets)
    examples = [made.example(record) for record in records]
    assert all(example.values["labels"] for example in examples)
