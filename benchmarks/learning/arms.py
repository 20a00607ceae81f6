"""How an arm trains: a run spec made of the experiment's setting and what the arm does otherwise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom_common.runspec import RunSpec

ADAMW_RATES = (1e-3, 2e-3, 4e-3)
SGD_RATES = (0.1, 0.3, 1.0)
OWN, POOL, ALONE = "own", "pool", "alone"
"""Data sets: each site's own part; all parts, at one more site; one site's part, at that site too."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the arms of an experiment have in common."""

    model: Mapping[str, Any]
    task: Mapping[str, Any]
    sites: int
    steps: int
    """Optimizer steps of each site in the whole run."""
    batch_examples: int
    """Of one step at one site; a machine with all tokens takes ``sites`` times as many."""
    warmup_steps: int
    evaluations: int
    """Points of the curve, at most."""
    curve_examples: int
    """Held-out examples that each site measures for the curve, whoever trains."""
    final_examples: int | None = None
    """The same for the final model; all if None."""
    metric: str = "loss"
    """By which learning rates are chosen and arms are compared."""
    higher_is_better: bool = False


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    name: str
    told: str
    """What it is, in a few words for the tables."""
    data: str = OWN
    local_steps: int = 10
    """H, steps between two exchanges."""
    inner: str = "adamw"
    rates: tuple[float, ...] = ADAMW_RATES
    """Grid of the sites' learning rate."""
    rates_of: str = ""
    """An arm whose tuned rate is taken over instead."""
    server: Mapping[str, Any] = field(default_factory=lambda: {"name": "fedavg"})
    server_rates: tuple[float | None, ...] = (None,)
    """Grid of the server's learning rate; None for its default."""
    algorithm: Mapping[str, Any] = field(default_factory=lambda: {"name": "plain"})
    transport: Mapping[str, Any] = field(default_factory=dict)
    has_all_tokens: bool = True
    """Whether one machine trains on as many tokens as all sites together, or on a site's share."""
    dropout: float = 0.0
    """Share of trainings whose site is gone."""
    seeds: int | None = None
    """Seeds at most; the profile's if not given."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Over the setting's."""

    @property
    def is_federated(self) -> bool:
        """Whether several sites train."""
        return self.data == OWN


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates of a trial."""

    local: float
    server: float | None = None

    def __str__(self) -> str:
        return f"{self.local:g}" + ("" if self.server is None else f"-{self.server:g}")

    @property
    def told(self) -> str:
        """For tables."""
        return f"{self.local:g}" + ("" if self.server is None else f", server {self.server:g}")


def run_spec(setting: Setting, arm: Arm, rates: Rates, seed: int, sites: Sequence[str] = ()) -> RunSpec:
    """The run of an arm; one machine has a round for each point of its curve, which ``sites`` measure."""
    steps = setting.steps
    is_larger = arm.has_all_tokens and not arm.is_federated
    local_steps = arm.local_steps if arm.is_federated else max(1, steps // setting.evaluations)
    rounds, rest = divmod(steps, local_steps)
    assert rest == 0, f"{steps} steps are no multiple of {local_steps}: arms would not see equal tokens"
    server = dict(arm.server) | ({} if rates.server is None else {"lr": rates.server})
    return RunSpec.model_validate(
        {
            "name": "learning",
            "model": {**setting.model, **arm.model},
            "task": setting.task,
            "data": arm.data,
            "rounds": rounds,
            "cohort": {
                "min_sites": setting.sites if arm.is_federated else 1,
                "quorum": 1,
                "attempts": 3 if arm.dropout else 1,
                "stall_s": 3600,
            },
            "local": {
                "steps": local_steps,
                "batch_examples": setting.batch_examples * (setting.sites if is_larger else 1),
                "optimizer": {"name": arm.inner, "lr": rates.local},
                "schedule": {"kind": "cosine", "warmup_steps": setting.warmup_steps},
                "algorithm": arm.algorithm,
            },
            "aggregation": {"deterministic": True, "server_optimizer": server},
            "transport": arm.transport,
            "evaluation": {
                "when": "after_round",  # by every site, whoever trains next
                "every_rounds": max(1, rounds // setting.evaluations),
                "max_examples": setting.curve_examples,
                "central": () if arm.is_federated else tuple(sites),  # the very same examples
            },
            "seed": seed,
        }
    )


def measuring_spec(setting: Setting, spec: RunSpec) -> RunSpec:
    """Measures the model of a run at every site, on all that it holds out or the part that is asked for."""
    changes = {
        "data": OWN,
        "cohort": {"min_sites": setting.sites, "quorum": 1, "stall_s": 3600},
        "transport": {},
        "evaluation": {"when": "after_round", "max_examples": setting.final_examples},
    }
    return RunSpec.model_validate(spec.model_dump(mode="json") | changes)
