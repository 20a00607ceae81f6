"""Which of the sites that fit take part in a round: the policies, and where others plug in.

A policy is a pure function of a ``Draw``: a resumed run, and another run of
the same spec, pick the same sites, whatever the order of arrival or the
version of Python. docs/operations/sites.md shows how to write one.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import entry_points
from typing import Protocol

from fedloom_common.errors import BadSpec, TooFewUpdates
from fedloom_common.runspec import Cohort

PLUGINS = "fedloom.selection"
"""Entry-point group of policies that other packages bring."""

NAMES_TOLD = 20  # a message is for people


@dataclass(frozen=True, kw_only=True)
class Draw:
    """All that a policy may know."""

    sites: tuple[str, ...]
    """Sites that fit, in the order of their names."""
    count: int
    """Sites to pick, at most as many as there are."""
    seed: int
    """The run's seed."""
    round: int
    attempt: int
    weights: Mapping[str, float] = field(default_factory=dict)
    """How much each site has to learn from, all in one unit: see ``known_weights``."""
    last_picked: Mapping[str, int] = field(default_factory=dict)
    """When a site was last asked to train in this run: a larger number is later, none is never."""

    def ticket(self, site: str) -> float:
        """A site's random number of this draw, above 0 and below 1."""
        text = f"cohort/{self.seed}/{self.round}/{self.attempt}/{site}"
        digest = hashlib.sha256(text.encode()).digest()
        return (int.from_bytes(digest[:6], "big") + 0.5) / (1 << 48)


class Policy(Protocol):
    """Picks exactly ``draw.count`` different sites of ``draw.sites``, in any order."""

    def __call__(self, draw: Draw, /) -> Iterable[str]: ...


def uniform(draw: Draw) -> Iterable[str]:
    """Each site as likely as the other: the lowest tickets win."""
    return _lowest(draw, draw.ticket)


def weighted(draw: Draw) -> Iterable[str]:
    """Each next site with a probability in proportion to its weight, none twice; those of weight 0 come last.

    Source: Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir", Information
    Processing Letters 97(5): the largest uₖ^(1/wₖ), here as the smallest −ln(uₖ)/wₖ.
    """

    def key(site: str) -> float:
        weight = draw.weights.get(site, 0.0)
        return -math.log(draw.ticket(site)) / weight if weight > 0 else math.inf

    return _lowest(draw, key)


def round_robin(draw: Draw) -> Iterable[str]:
    """Who has waited longest, new sites first, then in the order of names: every site gets its turn."""
    return sorted(draw.sites, key=lambda site: (draw.last_picked.get(site, -1), site))[: draw.count]


def every(draw: Draw) -> Iterable[str]:
    """Every site that fits."""
    return draw.sites


POLICIES: Mapping[str, Policy] = {
    "all": every,
    "round_robin": round_robin,
    "uniform": uniform,
    "weighted": weighted,
}


def find_policy(name: str) -> Policy:
    """The policy of a name, ours or a plug-in's.

    Raises:
        BadSpec: there is none of that name, or it cannot be loaded.
    """
    if name in POLICIES:
        return POLICIES[name]
    plugins = entry_points(group=PLUGINS)
    if name not in plugins.names:
        known = ", ".join(sorted({*POLICIES, *plugins.names}))
        raise BadSpec(f"cohort.policy: there is no policy {name!r}; the coordinator has {known}")
    try:
        policy: Policy = plugins[name].load()
    except (ImportError, AttributeError) as error:
        raise BadSpec(f"cohort.policy: the plug-in {name!r} cannot be loaded: {error}") from error
    return policy


def select(draw: Draw, cohort: Cohort) -> tuple[str, ...]:
    """A round's cohort, in the order of its sites' names.

    Raises:
        TooFewUpdates: fewer sites fit than ``cohort.min_sites``.
        BadSpec: the policy is not there, or picks other than it was asked to.
    """
    if len(draw.sites) < cohort.min_sites:
        raise TooFewUpdates(
            f"{len(draw.sites)} sites fit ({_told(draw.sites)}), round {draw.round} needs {cohort.min_sites} "
            "(cohort.min_sites): start more clients"
        )
    return pick(draw, cohort.policy)


def pick(draw: Draw, policy: str) -> tuple[str, ...]:
    """What a policy picks, in the order of the sites' names.

    Raises:
        BadSpec: the policy is not there, or picks other than it was asked to.
    """
    picked = list(find_policy(policy)(draw))
    wrong = sorted(set(picked) - set(draw.sites))
    if wrong or len(picked) != draw.count or len(set(picked)) != len(picked):
        raise BadSpec(
            f"cohort.policy: {policy!r} picked {_told(picked)} where {draw.count} different ones of "
            f"{_told(draw.sites)} were wanted: mend the plug-in"
        )
    return tuple(sorted(picked))


def cohort_size(cohort: Cohort, fitting: int) -> int:
    """Sites that a round of a cohort picks of those that fit."""
    if cohort.policy == "all":
        return fitting
    # As the operator wrote it: 0.07 of 100 sites is 7, although 0.07 * 100 > 7 in binary.
    share = math.ceil(Fraction(str(cohort.fraction)) * fitting)
    return min(fitting, max(cohort.min_sites, share))


def known_weights(
    sites: Collection[str], examples: Mapping[str, int], data_bytes: Mapping[str, int]
) -> Mapping[str, float]:
    """What ``weighted`` weighs by: examples where every site's are known, otherwise the size of its data.

    ``examples`` are nₖ of earlier rounds. The two are different units, and a
    site that has yet to train must be weighed by the same as the others.
    """
    known = all(examples.get(site) for site in sites)
    return {site: float((examples if known else data_bytes).get(site, 0)) for site in sites}


def _told(sites: Sequence[object]) -> str:
    """Names for people, the first few of many."""
    names = ", ".join(str(site) for site in sites[:NAMES_TOLD])
    return f"{names} and {len(sites) - NAMES_TOLD} more" if len(sites) > NAMES_TOLD else names or "none"


def _lowest(draw: Draw, key: Callable[[str], float]) -> list[str]:
    return sorted(draw.sites, key=lambda site: (key(site), draw.ticket(site), site))[: draw.count]
