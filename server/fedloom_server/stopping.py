"""Whether a run is finished, and why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedloom_common.errors import BadSpec
from fedloom_common.runspec import Patience, RunSpec, Target
from fedloom_common.runspec.evaluation import CENTRAL_PREFIX, TRAIN_PREFIX


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """A finished round's metrics over all sites."""

    number: int
    """From 1; 0 is the evaluation of the initial model."""
    metrics: Mapping[str, float]


def is_measured(result: RoundResult, *, by_central: bool = False) -> bool:
    """Whether an evaluation has reported on the round's model: of those who train, or of a central site."""
    measured = [name for name in result.metrics if not name.startswith(TRAIN_PREFIX)]
    return any(name.startswith(CENTRAL_PREFIX) == by_central for name in measured)


def stop_reason(spec: RunSpec, history: Sequence[RoundResult], elapsed_s: float) -> str | None:
    """Why the run ends after the last round of ``history``, or None if it goes on.

    ``history`` has every finished round, first to last; ``elapsed_s`` is the
    time since the run began.

    Raises:
        BadSpec: a stop condition waits for a metric that evaluations do not report.
    """
    if not history:
        return None
    stop = spec.stop
    conditions = [condition for condition in (stop.target, stop.patience) if condition]
    for condition in conditions:
        _require_known(condition.metric, history)
    reasons = [
        _target_reached(stop.target, history) if stop.target else None,
        _all_rounds_done(spec, history, [condition.metric for condition in conditions]),
        _no_longer_better(stop.patience, history) if stop.patience else None,
        _time_is_up(stop.wall_s, history[-1], elapsed_s) if stop.wall_s else None,
    ]
    return next((reason for reason in reasons if reason), None)


def _require_known(metric: str, history: Sequence[RoundResult]) -> None:
    """Check a metric's name as soon as any evaluation has shown what there is."""
    if metric.startswith(TRAIN_PREFIX) and not any(result.number for result in history):
        return  # nobody has trained yet
    names = {name for result in history for name in result.metrics}
    by_central = metric.startswith(CENTRAL_PREFIX)
    if any(is_measured(result, by_central=by_central) for result in history) and metric not in names:
        raise BadSpec(
            f"a stop condition waits for metric {metric}, which no round reports; "
            f"metrics are: {', '.join(sorted(names))}"
        )


def _target_reached(target: Target, history: Sequence[RoundResult]) -> str | None:
    """Whether any round has: of one the metrics may come when the next is done, and they still count."""
    for result in history:
        value = result.metrics.get(target.metric, math.nan)
        better = value >= target.value if target.higher_is_better else value <= target.value
        if better:  # NaN compares as false both ways
            side = "at or above" if target.higher_is_better else "at or below"
            return (
                f"{target.metric} is {value:.6g} after round {result.number}, "
                f"{side} the target of {target.value:.6g}"
            )
    return None


def _all_rounds_done(spec: RunSpec, history: Sequence[RoundResult], waited_for: list[str]) -> str | None:
    if history[-1].number < spec.rounds:
        return None
    reason = f"all {spec.rounds} rounds are done" if spec.rounds > 1 else "the only round is done"
    never = [name for name in waited_for if not any(name in result.metrics for result in history)]
    return f"{reason}; no evaluation ever reported {', '.join(sorted(set(never)))}" if never else reason


def _no_longer_better(patience: Patience, history: Sequence[RoundResult]) -> str | None:
    best: RoundResult | None = None
    since_best = 0
    for result in history:
        value = result.metrics.get(patience.metric)
        if value is None:
            continue
        if _is_better(value, best, patience):
            best, since_best = result, 0
        else:
            since_best += 1
    if since_best < patience.evaluations:
        return None
    if best is None:
        return f"{patience.metric} was not a number in {since_best} evaluations in a row"
    # with a smallest change that counts, the best of all may be a later one
    by, of = (
        (f" by {patience.min_delta:.6g}", "the last that did") if patience.min_delta else ("", "its best")
    )
    return (
        f"{patience.metric} has not improved{by} in {since_best} evaluations in a row; "
        f"{of} is {best.metrics[patience.metric]:.6g} after round {best.number}"
    )


def _is_better(value: float, best: RoundResult | None, patience: Patience) -> bool:
    if math.isnan(value):
        return False
    if best is None:
        return True
    gain = value - best.metrics[patience.metric]
    gain = gain if patience.higher_is_better else -gain
    return gain > 0 and gain >= patience.min_delta


def _time_is_up(wall_s: float, last: RoundResult, elapsed_s: float) -> str | None:
    if elapsed_s < wall_s:
        return None
    return f"the run has lasted {elapsed_s:.0f} s after round {last.number}, stop.wall_s is {wall_s:.0f} s"
