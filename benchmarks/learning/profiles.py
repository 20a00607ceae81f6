"""What the short and the full profile try."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from learning import language
from learning.trials import Experiment


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How much is tried."""

    told: str
    language: tuple[Experiment, ...]
    """Experiments on the corpus."""


SEEDS = (1, 2, 3)

PROFILES: Mapping[str, Callable[[], Profile]] = {
    "tiny": lambda: Profile(
        told="a few steps, to see that everything runs; its figures say nothing",
        language=(language.gates_experiment(steps=50, seeds=(1,)),),
    ),
    "short": lambda: Profile(
        told="the gates with three seeds, about 30 minutes on two free cores",
        language=(language.gates_experiment(steps=600, seeds=SEEDS),),
    ),
    "full": lambda: Profile(
        told="every arm; a day or so on two cores, stopped and taken up at will",
        language=(
            language.gates_experiment(steps=600, seeds=SEEDS),
            language.rules_experiment(4, steps=1000, seeds=SEEDS),
            language.exchange_experiment(steps=1000, seeds=SEEDS),
            language.rules_experiment(16, steps=1000, seeds=SEEDS),
        ),
    ),
}
