"""A run spec's evaluation: how often the model is measured, and what then ends the run early."""

from typing import Any, Literal

from pydantic import Field, model_validator

from fedloom_common.strict import Name, Strict

CENTRAL_PREFIX = "central_"
"""Begins the names of metrics that the sites of ``evaluation.central`` measured."""
TRAIN_PREFIX = "train_"
"""Begins the names of what training tells of itself."""
GROWING = frozenset({"accuracy", "macro_f1", "token_accuracy", "exact_match", "rouge_l"})
"""Metrics that are better the higher they are; a run's other ones, but for plug-ins', the lower."""


class Goal(Strict):
    """By what one model is better than another."""

    metric: str = "loss"
    """Metric of the round, as ``fedloom run show`` names it."""
    higher_is_better: bool = False
    """Direction of the metric; needs to be said of a plug-in's own ones alone."""

    @model_validator(mode="before")
    @classmethod
    def _known_metrics_have_a_direction(cls, data: Any) -> Any:
        if isinstance(data, dict) and str(data.get("metric")).removeprefix(CENTRAL_PREFIX) in GROWING:
            return {"higher_is_better": True} | data
        return data


class Evaluation(Strict):
    """Measuring the global model on the sites' held-out data."""

    when: Literal["before_training", "after_round"] = "before_training"
    """``before_training``: each site measures the model that it is about to train from, so that a model's
    metrics come with the next round's updates and cost no round trip; the run's last model is measured for
    itself. ``after_round``: every site is asked to measure each new model, before the next round begins."""
    every_rounds: int = Field(default=1, ge=0)
    """Rounds between evaluations; the last round is always evaluated. 0 for none, not even of the initial
    model."""
    initial: bool = True
    """Whether the initial model is evaluated too."""
    central: tuple[Name, ...] = ()
    """Sites of the operator's own that only measure, each model as the others do and on data of their own:
    metrics as ``central_loss``. A model is measured while the next round trains, whose end waits for it."""
    alone: bool = False
    """Whether each site that took part trains by itself at the end, from the initial model for as many steps
    as the run gave it: ``fedloom run report`` then says whether it was worth joining. It takes every site
    about as long as its part in the run."""
    best: Goal | None = None
    """By what a run's best model is told, kept and exported; by what stops the run if not given, which is
    ``stop.target`` or ``stop.patience``, and else by the loss."""
    max_examples: int | None = Field(default=None, ge=1)
    """Most held-out examples that each site measures; all if not given."""
    deadline_s: float = Field(default=3600, gt=0)
    """Seconds after which a model's metrics are those of the sites that have measured it."""


class Target(Goal):
    """Stop when a metric is good enough."""

    value: float
    """Stop at this value or better."""


class Patience(Goal):
    """Stop when a metric no longer gets better."""

    evaluations: int = Field(ge=1)
    """Stop after so many evaluations in a row without improvement."""
    min_delta: float = Field(default=0.0, ge=0)
    """Smallest change that counts as improvement."""
    restore_best: bool = True
    """Whether the finished run's model is its best one, or the last."""


class Stop(Strict):
    """Conditions that end a run before its last round; the first to hold wins."""

    target: Target | None = None
    """Stop when a metric is good enough."""
    patience: Patience | None = None
    """Stop when a metric no longer gets better."""
    wall_s: float | None = Field(default=None, gt=0)
    """Stop at the end of the round in which the run has lasted so many seconds."""
