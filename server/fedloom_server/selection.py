"""Which of the connected sites take part in a round."""

import hashlib
import math
from collections.abc import Collection
from fractions import Fraction

from fedloom_common.errors import TooFewUpdates
from fedloom_common.runspec import Cohort


def select(
    connected: Collection[str],
    *,
    cohort: Cohort,
    seed: int,
    round: int,  # noqa: A002
    attempt: int,
) -> tuple[str, ...]:
    """A random cohort of the connected sites, in the order of their names.

    Every site draws a ticket, a hash of the arguments and its name, and the
    lowest tickets win. So the draw depends on nothing else: a resumed run, and
    another run of the same spec, pick the same sites, whatever the order of
    arrival or the version of Python.

    Raises:
        TooFewUpdates: fewer sites are connected than ``cohort.min_sites``.
    """
    sites = set(connected)
    if len(sites) < cohort.min_sites:
        raise TooFewUpdates(
            f"{len(sites)} sites are connected ({', '.join(sorted(sites)) or 'none'}), round {round} needs "
            f"{cohort.min_sites} (cohort.min_sites): start more clients"
        )
    # As the operator wrote it: 0.07 of 100 sites is 7, although 0.07 * 100 > 7 in binary.
    share = math.ceil(Fraction(str(cohort.fraction)) * len(sites))
    tickets = sorted((_ticket(seed, round, attempt, site), site) for site in sites)
    return tuple(sorted(site for _, site in tickets[: max(cohort.min_sites, share)]))


def _ticket(seed: int, round: int, attempt: int, site: str) -> bytes:  # noqa: A002
    return hashlib.sha256(f"cohort/{seed}/{round}/{attempt}/{site}".encode()).digest()
