"""Server optimizers: what a round's mean, or another rule's centre, is taken for, and the step that follows.

With θ the present model and θ̄ the centre,  g = θ − θ̄  is the gradient. Nothing here knows of files: a step
is a formula on arrays of values, in float64, with the state's arrays changed in place.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom_common.rates import rate_factor
from fedloom_common.runspec import (
    SGD,
    AnyServerOptimizer,
    DiLoCo,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    RunSpec,
)

Values = NDArray[np.float64]


class ServerOptimizer(Protocol):
    """A step's formula."""

    name: str
    slots: Mapping[str, float]
    """What the state holds for every value of the model, and what it begins with."""

    def step(self, gradient: Values, state: Sequence[Values], rate: float, number: int) -> Values:
        """What is subtracted from the model; ``gradient`` is used up, ``state`` becomes the next round's.

        ``number`` counts the steps of the state, from 1.
        """


class GradientDescent:
    """θ ← θ − η g.

    Source: Reddi et al. 2021, arXiv:2003.00295, algorithm 1 with SGD as the server's optimizer.
    """

    name = "fedavg"
    slots: Mapping[str, float] = {}

    def step(self, gradient: Values, state: Sequence[Values], rate: float, number: int) -> Values:
        """η g."""
        gradient *= rate
        return gradient


class Momentum:
    """v ← β v + g;  θ ← θ − η v,  or, with Nesterov's look ahead,  θ ← θ − η (g + β v):  as torch.optim.SGD.

    Source: Hsu et al. 2019, arXiv:1909.06335 (FedAvgM); Douillard et al. 2023, arXiv:2311.08105 (DiLoCo).
    """

    def __init__(self, spec: FedAvgM | DiLoCo) -> None:
        self.name: str = spec.name
        self._beta, self._is_nesterov = spec.momentum, isinstance(spec, DiLoCo)
        self.slots: Mapping[str, float] = {"momentum": 0.0}

    def step(self, gradient: Values, state: Sequence[Values], rate: float, number: int) -> Values:
        """η v, or η (g + β v)."""
        (velocity,) = state
        velocity *= self._beta
        velocity += gradient
        if self._is_nesterov:
            gradient += self._beta * velocity
            return rate * gradient
        return rate * velocity


class Adaptive:
    """m ← β₁ m + (1 − β₁) g;  θ ← θ − η m / (√v + τ),  where v becomes

    - v + g²                              (FedAdagrad)
    - v − (1 − β₂) g² sign(v − g²)        (FedYogi)
    - β₂ v + (1 − β₂) g²                  (FedAdam)

    m begins with 0, v with τ². With bias correction, of which only FedAdam knows, step t divides m by 1 − β₁ᵗ
    and v by 1 − β₂ᵗ before it uses them; with v from 0 that is torch.optim.Adam, τ being its ε.

    Source: Reddi et al. 2021, arXiv:2003.00295, algorithm 2.
    """

    def __init__(self, spec: FedAdam | FedYogi | FedAdagrad) -> None:
        self.name: str = spec.name
        self._tau = spec.tau
        self._beta1, self._beta2 = (spec.beta, 0.0) if isinstance(spec, FedAdagrad) else spec.betas
        self._is_corrected = isinstance(spec, FedAdam) and spec.bias_correction
        v = spec.tau**2 if spec.initial_v is None else spec.initial_v
        self.slots: Mapping[str, float] = {"m": 0.0, "v": v}

    def step(self, gradient: Values, state: Sequence[Values], rate: float, number: int) -> Values:
        """η m / (√v + τ)."""
        m, v = state
        m *= self._beta1
        m += (1 - self._beta1) * gradient
        gradient *= gradient
        self._take_square(v, gradient)
        root: Values = np.sqrt(v)
        if self._is_corrected:
            rate /= 1 - self._beta1**number
            root /= math.sqrt(1 - self._beta2**number)
        step: Values = rate * m / (root + self._tau)
        return step

    def _take_square(self, v: Values, square: Values) -> None:
        if self.name == "fedadagrad":
            v += square
        elif self.name == "fedyogi":
            v -= (1 - self._beta2) * square * np.sign(v - square)
        else:
            v *= self._beta2
            v += (1 - self._beta2) * square


def optimizer_for(spec: AnyServerOptimizer) -> ServerOptimizer | None:
    """The step that a run spec asks for; None if the centre itself is the next model."""
    if isinstance(spec, FedAvg):
        is_plain = spec.lr == 1 and spec.schedule.kind == "constant" and not spec.schedule.warmup_rounds
        return None if is_plain else GradientDescent()
    return Momentum(spec) if isinstance(spec, FedAvgM | DiLoCo) else Adaptive(spec)


def learning_rate(spec: RunSpec, round_number: int) -> float:
    """η of a round, counted from 1.

    Steps of adaptive optimizers are about as large, whatever sites send: AdamW and adapters need small ones.
    """
    optimizer = spec.aggregation.server_optimizer
    peak, schedule = optimizer.lr, optimizer.schedule
    if peak is None:
        is_large = isinstance(spec.local.optimizer, SGD) and spec.model.adapter is None
        peak = 1e-2 if is_large else 1e-3
    return peak * rate_factor(
        schedule.kind, schedule.warmup_rounds, schedule.final_ratio, round_number - 1, spec.rounds
    )
