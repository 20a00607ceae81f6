"""Which of a run's models is the best, and which one it ends with."""

import math
from collections.abc import Sequence

from fedloom_common.runspec import RunSpec
from fedloom_server.records import Run, RunState
from fedloom_server.stopping import RoundResult


def ranked(spec: RunSpec, history: Sequence[RoundResult]) -> list[RoundResult]:
    """The measured models, best first; of equals the older one."""
    name, sign = spec.goal.metric, -1 if spec.goal.higher_is_better else 1
    measured = [result for result in history if math.isfinite(result.metrics.get(name, math.nan))]
    return sorted(measured, key=lambda result: (sign * result.metrics[name], result.number))


def best_of(spec: RunSpec, history: Sequence[RoundResult]) -> RoundResult | None:
    """The best of the measured models; None while none is measured."""
    return next(iter(ranked(spec, history)), None)


def final_round(run: Run, history: Sequence[RoundResult]) -> int:
    """The round that made the model which an export gives: the latest one's, unless the best is restored."""
    best = best_of(run.spec, history)
    if run.state is RunState.FINISHED and restores_best(run.spec) and best is not None:
        return best.number
    return run.rounds_done


def restores_best(spec: RunSpec) -> bool:
    """Whether a finished run's model is its best one."""
    return spec.stop.patience is not None and spec.stop.patience.restore_best
