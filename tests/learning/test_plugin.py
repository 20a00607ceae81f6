"""The example of a task that sites install, as a site would have it."""

import tomllib
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec import RunSpec

EXAMPLE = Path(__file__).parents[2] / "examples/custom_task"
TAGS = {"Ann": "person", "Bob": "person", "Rome": "place", "Oslo": "place", "from": "other", "to": "other"}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip leaves of the example's pyproject.toml."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site-packages/fedloom_wordtags-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    [(name, target)] = project["entry-points"]["fedloom.tasks"].items()
    (info / "entry_points.txt").write_text(f"[fedloom.tasks]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(str(info.parent))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    assert "wordtags" in {entry_point.name for entry_point in entry_points(group="fedloom.tasks")}


def letters(number: int) -> list[dict[str, Any]]:
    names = list(TAGS)
    return [
        {"words": words, "tags": [TAGS[word] for word in words]}
        for place in range(number)
        if (words := [names[place % 6], names[(place * 5 + place // 6) % 6], names[place % 4]])
    ]


@pytest.fixture
def example_run(new_run: Callable[..., Any]) -> Any:
    spec = RunSpec.model_validate(yaml.safe_load((EXAMPLE / "run.yaml").read_text()))
    model = spec.model.model_dump() | {
        "config": (spec.model.config or {}) | {"hidden_size": 32, "num_hidden_layers": 1}
    }
    return new_run("bert", spec.task.model_dump(), model=model)


def test_the_example_learns_at_a_site_that_has_installed_it(installed: None, example_run: Any) -> None:
    site = example_run.site("a", letters(100))
    before = site.evaluate()
    after = site.evaluate(Path(site.train().update_path))
    assert after.metrics["loss"] < 0.75 * before.metrics["loss"]
    assert after.tokens == 3 * after.examples == sum(after.counts["actual"]) == after.weights["accuracy"]
    assert set(after.metrics) == {"loss", "accuracy", "macro_f1", "shortened_share"}


def test_a_site_without_the_plug_in_says_what_to_install(example_run: Any) -> None:
    with pytest.raises(TrainingFailed, match="no task plug-in wordtags; it has none: install the package"):
        example_run.site("a", letters(10)).train()


def test_a_record_that_a_plug_in_refuses_is_named(installed: None, example_run: Any) -> None:
    bad = [*letters(2), {"words": ["Ann"], "tags": ["river"]}]
    with pytest.raises(TrainingFailed, match=r"record 3 of .*data\.jsonl: a tag of it is none of other,"):
        example_run.site("a", bad).train()


def test_a_plug_in_that_is_no_task_is_refused(
    installed: None, example_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wordtags

    monkeypatch.setattr(wordtags, "WordTags", lambda setting: object())
    with pytest.raises(TrainingFailed, match="makes a object, which lacks a part of RecordTask"):
        example_run.site("a", letters(10)).train()
