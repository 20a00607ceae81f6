"""Rules of training alone; that it is the plain loop stands in test_trainer.py."""

import math
from typing import Any

import pytest

from fedloom_client.training.alone import better, is_measured_after, told_on
from fedloom_client.training.orders import WorkerProgress, WorkerResult
from fedloom_common.runspec import RunSpec


def spec(**changes: Any) -> RunSpec:
    facts = {"name": "a", "model": {"config": {"model_type": "gpt2"}}, "data": "texts", "rounds": 9}
    return RunSpec.model_validate(facts | {"local": {"steps": 1}} | changes)


def result(**metrics: float) -> WorkerResult:
    return WorkerResult(examples=1, tokens=1, metrics=metrics)


def best_of(run: RunSpec, *results: WorkerResult) -> WorkerResult | None:
    best = None
    for each in results:
        best = better(run, best, each)
    return best


@pytest.mark.parametrize(("every", "rounds"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5]), (0, [5])])
def test_it_is_measured_where_the_run_measures_and_at_its_end(every: int, rounds: list[int]) -> None:
    run = spec(evaluation={"every_rounds": every})
    assert [n for n in range(1, 6) if is_measured_after(run, n, 5)] == rounds


def test_the_best_is_the_best_by_the_runs_own_metric() -> None:
    first, second, third = (
        result(loss=2.0, f1=0.3), result(loss=1.0, f1=0.2), result(loss=1.5, f1=math.nan),
    )  # fmt: skip
    assert best_of(spec(), first, second, third) is second
    by_f1 = spec(evaluation={"best": {"metric": "f1", "higher_is_better": True}})
    assert best_of(by_f1, first, second, third) is first
    assert best_of(by_f1, third, second) is second
    stop = {"patience": {"metric": "central_loss", "evaluations": 1}}
    central = spec(stop=stop, evaluation={"central": ["lab"]})
    assert best_of(central, first, second, third) is second
    stop = {"patience": {"metric": "central_f1", "evaluations": 1, "higher_is_better": True}}
    central = spec(stop=stop, evaluation={"central": ["lab"]})
    assert best_of(central, first, second, third) is first  # by its own f1, as the report judges


def test_progress_is_told_as_part_of_all_rounds_steps() -> None:
    heard: list[WorkerProgress] = []
    tell = told_on(heard.append, 20, 50)
    tell(WorkerProgress(phase="train", done=3, total=10, loss=1.0))
    tell(WorkerProgress(phase="evaluate", done=1, total=2))
    assert [(p.phase, p.done, p.total) for p in heard] == [("train", 23, 50), ("evaluate", 1, 2)]
