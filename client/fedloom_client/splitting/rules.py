"""Who gets which record. Pure functions of a census: the same census and seed give the same split."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom_client.splitting.census import Census, Coded
from fedloom_common.errors import BadSpec

MOST_SITES = 500  # each has a file open while records are copied
ALPHAS = 1e-4, 1e6  # beyond, shares round to 0 and 1, or to all alike
DRAWS = 1000  # of proportions, until every site has enough

Shares = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which site each record goes to."""

    names: tuple[str, ...]
    sites: NDArray[np.int32]
    """Number of each record's site."""


def iid(census: Census, shares: Sequence[float], seed: int) -> Split:
    """Records at random; site k gets its share of them, to the nearest record.

    Raises:
        BadSpec: some site would get none.
    """
    counts = apportion(len(census), np.asarray(shares))
    if not counts.all():
        raise BadSpec(
            f"of {len(census)} records site {int(np.argmin(counts)) + 1} of {len(counts)} would get none: "
            "make its share larger, or take fewer sites"
        )
    sites = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return Split(names=numbered(len(counts)), sites=np.random.default_rng(seed).permutation(sites))


def dirichlet(label: Coded, sites: int, *, alpha: float, seed: int, at_least: int = 1) -> Split:
    """Each label's records in proportions pₗ ~ Dir(α) over the sites: the smaller α, the more they differ.

    Proportions are drawn anew until every site has ``at_least`` so many records.

    Raises:
        BadSpec: that never happened, or α is out of bounds.
    Source: Yurochkin et al. 2019, arXiv:1905.12022, section 4; Li et al. 2022, arXiv:2102.02079.
    """
    if not ALPHAS[0] <= alpha <= ALPHAS[1]:
        raise BadSpec(f"--dirichlet is {alpha:g}: wanted a number from {ALPHAS[0]:g} to {ALPHAS[1]:g}")
    generator = np.random.default_rng(seed)
    totals = np.bincount(label.codes, minlength=len(label.values))
    for _ in range(DRAWS):
        shares = generator.dirichlet(np.full(sites, alpha), len(totals))
        counts = np.stack([apportion(total, share) for total, share in zip(totals, shares, strict=True)])
        if counts.sum(axis=0).min() >= at_least:
            break
    else:
        raise BadSpec(
            f"in {DRAWS} draws with alpha {alpha:g} some site always had fewer than {at_least} of "
            f"{len(label.codes)} records: raise --dirichlet, or lower --sites or --at-least"
        )
    chosen = np.empty(len(label.codes), np.int32)
    for number, count in enumerate(counts):
        members = np.flatnonzero(label.codes == number)
        chosen[members] = generator.permutation(np.repeat(np.arange(sites, dtype=np.int32), count))
    return Split(names=numbered(sites), sites=chosen)


def grouped(groups: Coded, sizes: NDArray[np.uint32], sites: int | None) -> Split:
    """Records of one group stay together: a site for each, or groups joined to so many sites alike in bytes.

    The largest group goes first, each to the site that has least so far (LPT).

    Raises:
        BadSpec: there are fewer groups than sites, or more than there may be sites.
    Source: Graham 1969, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17(2).
    """
    number = len(groups.values)
    if sites is None:
        if number > MOST_SITES:
            raise BadSpec(
                f"there are {number} groups, too many for a site each: join them with --sites, at most "
                f"{MOST_SITES}"
            )
        return Split(names=plain_names(groups.values), sites=groups.codes)
    if number < sites:
        raise BadSpec(f"there are {number} groups, too few for {sites} sites: lower --sites")
    weights = np.bincount(groups.codes, weights=sizes, minlength=number)
    place_of, loads = np.empty(number, np.int32), np.zeros(sites)
    for group in np.argsort(-weights, kind="stable"):
        place_of[group] = np.argmin(loads)
        loads[place_of[group]] += weights[group]
    return Split(names=numbered(sites), sites=place_of[groups.codes])


def by_file(census: Census) -> Coded:
    """Each file as a group."""
    stems = tuple(Path(name).stem for name in census.names)
    return Coded(codes=census.files, values=stems)


def apportion(total: int, shares: Shares) -> NDArray[np.int64]:
    """Whole numbers that add up to ``total``, each within one of its share (largest remainders)."""
    exact = total * shares / shares.sum()
    counts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    rest = int(total - counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return counts


def numbered(sites: int) -> tuple[str, ...]:
    """site-1, site-2 … with as many digits as the last."""
    digits = len(str(sites))
    return tuple(f"site-{number:0{digits}}" for number in range(1, sites + 1))


def plain_names(values: Sequence[str]) -> tuple[str, ...]:
    """Values as names of sites and folders; a number is added to those that become the same."""
    names: list[str] = []
    for value in values:
        plain = re.sub(r"[^a-z0-9_-]+", "-", value.lower()).strip("_-")[:56] or "site"
        name, number = plain, 1
        while name in names:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return tuple(names)
