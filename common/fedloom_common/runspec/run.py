"""The run spec, whole: its parts side by side, and how they may not contradict each other."""

from collections.abc import Iterator
from typing import Any, Self

from pydantic import Field, model_validator

from fedloom_common.runspec.aggregation import Aggregation
from fedloom_common.runspec.algorithms import Scaffold
from fedloom_common.runspec.cohort import Cohort
from fedloom_common.runspec.evaluation import CENTRAL_PREFIX, GROWING, TRAIN_PREFIX, Evaluation, Goal, Stop
from fedloom_common.runspec.local import Local
from fedloom_common.runspec.mode import Mode, Sync
from fedloom_common.runspec.model import ModelSpec
from fedloom_common.runspec.tasks import CausalLM, Task
from fedloom_common.runspec.transport import Transport
from fedloom_common.strict import Name, Strict

_ONLY_IN_ROUNDS = (
    ("cohort", "fraction", "mode.concurrency says how many sites train at a time"),
    ("cohort", "quorum", "mode.buffer says how many updates make a version"),
    ("cohort", "over_select", "mode.concurrency says how many sites train at a time"),
    ("cohort", "late", "every update counts when it comes; mode.staleness says how much"),
    ("cohort", "staleness", "mode.staleness says what an update counts"),
    ("cohort", "deadline_s", "nobody waits for a site; mode.staleness.max says how late it may be"),
    ("cohort", "attempts", "a site that fails is replaced at once, and nothing is tried again"),
    ("aggregation", "deterministic", "which updates make a version depends on when they come"),
    ("transport", "down", "it tells a model's change to sites that hold the one before, which few do then"),
)
"""What has no meaning without rounds, and what to do instead."""


_OF_EVERY_TASK = frozenset({f"{TRAIN_PREFIX}loss"})


class RunSpec(Strict):
    """A run, whole."""

    name: Name
    """Name for people: small letters, digits, dots, dashes and underscores."""
    model: ModelSpec
    """Which model is trained."""
    task: Task = CausalLM()
    """What the model is trained to do."""
    data: Name
    """Name of the data set; every site says in its own config which files that is."""
    rounds: int = Field(ge=1, le=1_000_000)
    """Rounds at most."""
    mode: Mode = Sync()
    """Whether sites work in rounds, or each at its own pace."""
    cohort: Cohort = Cohort()
    """Which sites take part in a round."""
    local: Local
    """What each site does in a round."""
    aggregation: Aggregation = Aggregation()
    """How updates become the next global model."""
    transport: Transport = Transport()
    """How models and updates are made smaller for the wire."""
    evaluation: Evaluation = Evaluation()
    """Measuring the global model."""
    stop: Stop = Stop()
    """Conditions that end the run early."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Source of all randomness: initial weights, cohorts, data order, dropout."""

    @model_validator(mode="before")
    @classmethod
    def _task_has_a_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("task"), dict):
            return data | {"task": {"kind": "causal_lm"} | data["task"]}
        return data

    @property
    def goal(self) -> Goal:
        """By what a model of the run is better than another."""
        stops = self.stop.target or self.stop.patience
        if self.evaluation.best is not None or stops is None:
            return self.evaluation.best or Goal()
        return Goal(metric=stops.metric, higher_is_better=stops.higher_is_better)

    @property
    def own_goal(self) -> Goal:
        """By what a site's own measurements are judged: as the goal, of a central metric its own one."""
        return self.goal.model_copy(update={"metric": self.goal.metric.removeprefix(CENTRAL_PREFIX)})

    def mistaken_goals(self) -> Iterator[str]:
        """Metrics that a stop or the best model waits for and that no round of this task would report.

        Not looked at where a run is read that has begun: that ends with a reason of its own.
        """
        goals = {
            "stop.target": self.stop.target,
            "stop.patience": self.stop.patience,
            "evaluation.best": self.evaluation.best,
        }
        measured = self.task.metrics
        for path, goal in goals.items():
            if goal is None or measured is None:
                continue
            name = goal.metric.removeprefix(CENTRAL_PREFIX)
            if name not in measured and goal.metric not in _OF_EVERY_TASK:
                yield f"{path}.metric: {self.task.kind} has {', '.join(measured)} (came: {goal.metric!r})"
            elif goal.higher_is_better != (name in GROWING):
                way = "higher" if name in GROWING else "lower"
                yield f"{path}.higher_is_better: {name} is better the {way} it is; leave this out"

    @model_validator(mode="after")
    def _nothing_contradicts_the_mode(self) -> Self:
        if isinstance(self.mode, Sync):
            return self
        for section, key, instead in _ONLY_IN_ROUNDS:
            part = getattr(self, section)
            came, default = getattr(part, key), type(part).model_fields[key].default
            if came != default:
                told = part.model_dump(mode="json")[key]
                raise ValueError(f"{section}.{key} is {told}, but mode.kind is async: {instead}")
        if self.cohort.policy == "all" and self.mode.concurrency is not None:
            raise ValueError(
                f"cohort.policy all asks every site, and mode.concurrency is {self.mode.concurrency}: "
                "drop one of both"
            )
        return self

    @model_validator(mode="after")
    def _scaffold_works_in_rounds(self) -> Self:
        if isinstance(self.local.algorithm, Scaffold):
            for key, came in (("mode.kind", self.mode.kind), ("cohort.late", self.cohort.late)):
                if came in ("async", "carry"):
                    raise ValueError(
                        f"local.algorithm scaffold and {key}: {came} contradict each other: its control "
                        "variates are those of one round's cohort; drop one of them"
                    )
        return self

    @model_validator(mode="after")
    def _aggregation_fits(self) -> Self:
        self.aggregation.require_fit(self.mode, self.cohort, self.local)
        return self

    @model_validator(mode="after")
    def _nothing_contradicts_the_adapter(self) -> Self:
        for objection in self.model.adapter.objections(self) if self.model.adapter else ():
            raise ValueError(objection)
        return self

    @property
    def keeps_optimizer_state(self) -> bool:
        """Whether a site goes on with its optimizer's state, which is of no use to a round's new adapters."""
        is_stacked = self.model.adapter is not None and self.model.adapter.merge == "stack"
        return self.local.keep_optimizer_state and not is_stacked

    @property
    def leaves_at_sites(self) -> bool:
        """Whether an update leaves something at its site that is part of the next one, if it counts."""
        return isinstance(self.local.algorithm, Scaffold) or self.transport.feeds_back

    @model_validator(mode="after")
    def _stop_metric_is_measured(self) -> Self:
        if self.evaluation.every_rounds == 0 and (self.stop.target or self.stop.patience):
            raise ValueError("stop.target and stop.patience need evaluation.every_rounds of 1 or more")
        waited_for = (self.stop.target, self.stop.patience, self.evaluation.best)
        central = [goal.metric for goal in waited_for if goal and goal.metric.startswith(CENTRAL_PREFIX)]
        if central and not self.evaluation.central:
            raise ValueError(f"{central[0]} is measured by evaluation.central, which names no site")
        return self

    @model_validator(mode="after")
    def _late_updates_are_not_deterministic(self) -> Self:
        if self.cohort.late == "carry" and self.aggregation.deterministic:
            raise ValueError(
                "cohort.late: carry and aggregation.deterministic contradict each other: which round takes a "
                "late update depends on when it comes; drop one of them"
            )
        return self
