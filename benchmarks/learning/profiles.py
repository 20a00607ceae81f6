"""What the short and the full profile try, and where their data come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from learning import adapters, downloads, language, sentiment, sequences
from learning.corpora import split_corpus
from learning.federation import Sites
from learning.trials import Experiment

SEEDS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where things are."""

    corpus: Path
    split: str
    """How sites share the corpus."""
    downloads: Path
    """What is fetched stays here."""
    scratch: Path


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment and its data."""

    experiment: Experiment
    sites: Callable[[Place], Sites]
    """Writes the sites' data below ``scratch``."""
    fetch: Callable[[Path], object] = lambda downloads: None
    """Fetches what is not there of what the data or the model need."""
    warm: int = 32
    """Models kept in memory, of the sites that worked last."""
    is_large: bool = False
    """Whether its trials take turns, each with all cores: its model fills them, and the memory."""


def plans(profile: str, place: Place) -> list[Plan]:
    """The experiments of a profile."""
    return _PROFILES[profile](place)


def _tiny(place: Place) -> list[Plan]:
    return [_on_corpus(language.gates_experiment(steps=50, seeds=(1,)))]


def _short(place: Place) -> list[Plan]:
    return [_on_corpus(language.gates_experiment(steps=1000, seeds=SEEDS))]


def _full(place: Place) -> list[Plan]:
    return [
        *_short(place),
        _on_corpus(language.rules_experiment(4, steps=1000, seeds=SEEDS)),
        _on_corpus(language.exchange_experiment(steps=1000, seeds=SEEDS)),
        _sentiment(place, steps=100),
        _adapters(place, steps=40),
        _sequences(steps=2000),
        _on_corpus(language.rules_experiment(16, steps=1000, seeds=SEEDS[:1])),
    ]


def _tiny_others(place: Place) -> list[Plan]:
    plans = [_sentiment(place, steps=10), _adapters(place, steps=10), _sequences(steps=20)]
    return [replace(plan, experiment=_with_one_rate(plan.experiment)) for plan in plans]


def _with_one_rate(experiment: Experiment) -> Experiment:
    arms = tuple(replace(arm, rates=arm.rates[1:2]) for arm in experiment.arms)
    return replace(experiment, arms=arms, seeds=(1,))


def _on_corpus(experiment: Experiment) -> Plan:
    sites = experiment.setting.sites
    return Plan(
        experiment=experiment,
        sites=lambda place: split_corpus(place.corpus, place.split, sites, place.scratch / "texts"),
    )


def _sentiment(place: Place, steps: int) -> Plan:
    return Plan(
        experiment=sentiment.experiment(place.downloads / "minilm", steps, SEEDS),
        sites=lambda place: sentiment.sites(place.downloads, place.scratch / "texts"),
        fetch=downloads.sentiment,
    )


def _adapters(place: Place, steps: int) -> Plan:
    plan = _on_corpus(adapters.experiment(place.downloads / "smollm2", steps, SEEDS))
    return replace(plan, fetch=downloads.smollm2, warm=1, is_large=True)


def _sequences(steps: int) -> Plan:
    return Plan(
        experiment=sequences.experiment(steps, SEEDS),
        sites=lambda place: sequences.sites(place.corpus, place.scratch / "texts"),
    )


_PROFILES: Mapping[str, Callable[[Place], list[Plan]]] = {
    "tiny": _tiny,
    "short": _short,
    "full": _full,
    "tiny-others": _tiny_others,
}
PROFILES = tuple(_PROFILES)
