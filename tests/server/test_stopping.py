import math

import pytest

from fedloom_common.errors import BadSpec
from fedloom_common.runspec import RunSpec
from fedloom_server.stopping import RoundResult, stop_reason


def spec(*, rounds=10, **stop) -> RunSpec:
    return RunSpec.model_validate(
        {
            "name": "run", "model": {"config": {"model_type": "gpt2"}}, "data": "text", "rounds": rounds,
            "local": {"steps": 1}, "stop": stop,
        }
    )  # fmt: skip


def losses(*values, metric="loss"):
    """One round each, from round 1; None is a round without evaluation."""
    return [
        RoundResult(number=number, metrics={"train_loss": 9.0} | ({} if value is None else {metric: value}))
        for number, value in enumerate(values, 1)
    ]


def test_a_run_goes_on_until_its_rounds_are_done():
    assert stop_reason(spec(rounds=3), [], 0) is None
    assert stop_reason(spec(rounds=3), losses(3, 2), 0) is None
    assert stop_reason(spec(rounds=3), losses(3, 2, 1), 0) == "all 3 rounds are done"
    assert stop_reason(spec(rounds=1), losses(3), 0) == "the only round is done"


def test_a_round_counts_by_its_number():
    evaluated_first = [RoundResult(number=0, metrics={"loss": 5.0}), *losses(4)]
    assert stop_reason(spec(rounds=2), evaluated_first, 0) is None


def test_a_reached_target_stops_the_run():
    target = spec(target={"metric": "loss", "value": 2.5})
    assert stop_reason(target, losses(3, 2.6), 0) is None
    assert (
        stop_reason(target, losses(3, 2.5), 0) == "loss is 2.5 after round 2, at or below the target of 2.5"
    )


def test_a_target_may_ask_for_higher_values():
    target = spec(target={"metric": "accuracy", "value": 0.9, "higher_is_better": True})
    assert stop_reason(target, losses(0.1, 0.8, metric="accuracy"), 0) is None
    reason = stop_reason(target, losses(0.8, 0.95, metric="accuracy"), 0)
    assert reason == "accuracy is 0.95 after round 2, at or above the target of 0.9"


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_nan_never_reaches_a_target(higher_is_better):
    target = spec(target={"metric": "loss", "value": 2.5, "higher_is_better": higher_is_better})
    assert stop_reason(target, losses(math.nan), 0) is None


def test_a_target_counts_though_its_metric_came_after_the_next_round():
    target = spec(target={"metric": "loss", "value": 2.5})
    reason = stop_reason(target, losses(2.0, None), 0)
    assert reason == "loss is 2 after round 1, at or below the target of 2.5"


@pytest.mark.parametrize(
    "stop", [{"target": {"metric": "los", "value": 1}}, {"patience": {"metric": "los", "evaluations": 2}}]
)
def test_a_metric_that_evaluations_do_not_report_is_an_error_that_names_those_there_are(stop):
    with pytest.raises(
        BadSpec, match=r"waits for metric los, which no round reports; metrics are: loss, train_loss"
    ):
        stop_reason(spec(**stop), losses(3.0), 0)


def test_before_the_first_training_its_metrics_are_not_missing():
    target = spec(target={"metric": "train_loss", "value": 2.5})
    initial = RoundResult(number=0, metrics={"loss": 4.0, "perplexity": 54.6})
    assert stop_reason(target, [initial], 0) is None
    trained = RoundResult(number=1, metrics={"train_loss": 2.0})
    assert stop_reason(target, [initial, trained], 0).startswith("train_loss is 2 after round 1")


def test_before_the_first_evaluation_no_metric_is_missing():
    target = spec(target={"metric": "loss", "value": 2.5})
    assert stop_reason(target, losses(None, None), 0) is None


def test_a_run_whose_evaluations_all_failed_says_that_its_condition_was_never_tested():
    target = spec(rounds=2, target={"metric": "loss", "value": 2.5})
    reason = stop_reason(target, losses(None, None), 0)
    assert reason == "all 2 rounds are done; no evaluation ever reported loss"


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        pytest.param([3, 2, 2.1], False, id="one-of-two"),
        pytest.param([3, 2, 2.1, 2.2], True, id="two-of-two"),
        pytest.param([3, 2, 2.1, 1.9, 2.0], False, id="improvement-starts-anew"),
        pytest.param([3, 3, 3], True, id="equal-is-no-improvement"),
        pytest.param([3, 2, None, 2.1, None], False, id="rounds-without-evaluation-do-not-count"),
        pytest.param([3, math.nan, math.nan], True, id="nan-is-no-improvement"),
        pytest.param([math.nan, 3, 4], False, id="a-number-improves-on-nan"),
        pytest.param([math.inf, math.inf, math.inf], True, id="infinity-does-not-improve-on-itself"),
        pytest.param([3, 1, 2.9, 2.8], True, id="against-the-best-and-not-the-one-before"),
    ],
)
def test_patience_ends_after_two_evaluations_without_improvement(values, stops):
    reason = stop_reason(spec(patience={"evaluations": 2}), losses(*values), 0)
    assert (reason is not None) == stops


def test_patience_names_the_best_and_how_long_ago_it_was():
    reason = stop_reason(spec(patience={"evaluations": 2}), losses(3, 2, 2.5, 2.25), 0)
    assert reason == "loss has not improved in 2 evaluations in a row; its best is 2 after round 2"


def test_a_gain_below_min_delta_is_no_improvement():
    patience = spec(patience={"evaluations": 2, "min_delta": 0.5})
    assert stop_reason(patience, losses(3, 2.75, 2.625), 0) == (
        "loss has not improved by 0.5 in 2 evaluations in a row; the last that did is 3 after round 1"
    )
    assert stop_reason(patience, losses(3, 2.75, 2.5), 0) is None


def test_patience_may_ask_for_higher_values():
    patience = spec(patience={"metric": "accuracy", "evaluations": 2, "higher_is_better": True})
    assert stop_reason(patience, losses(0.1, 0.2, 0.3, metric="accuracy"), 0) is None
    assert stop_reason(patience, losses(0.3, 0.2, 0.1, metric="accuracy"), 0) is not None


def test_a_metric_that_is_never_a_number_runs_out_of_patience():
    reason = stop_reason(spec(patience={"evaluations": 2}), losses(math.nan, math.nan), 0)
    assert reason == "loss was not a number in 2 evaluations in a row"


def test_wall_time_ends_a_run_after_a_round():
    wall = spec(wall_s=60)
    assert stop_reason(wall, [], 100) is None
    assert stop_reason(wall, losses(3), 59.9) is None
    assert stop_reason(wall, losses(3), 61.2) == "the run has lasted 61 s after round 1, stop.wall_s is 60 s"


def test_the_target_is_the_reason_even_in_the_last_round():
    both = spec(rounds=2, target={"metric": "loss", "value": 2.5}, wall_s=1)
    assert stop_reason(both, losses(3, 2), 9) == "loss is 2 after round 2, at or below the target of 2.5"
