import subprocess
import sys
from collections import Counter

import pytest

from fedloom_common.errors import TooFewUpdates
from fedloom_common.runspec import Cohort
from fedloom_server.selection import select

HUNDRED = [f"site-{number:02}" for number in range(100)]


def cohort_of(connected, *, fraction=1.0, min_sites=1, seed=0, number=1, attempt=1):
    cohort = Cohort(fraction=fraction, min_sites=min_sites)
    return select(connected, cohort=cohort, seed=seed, round=number, attempt=attempt)


@pytest.mark.parametrize(
    ("connected", "fraction", "min_sites", "size"),
    [
        pytest.param(10, 1.0, 1, 10, id="all"),
        pytest.param(10, 0.5, 1, 5, id="half"),
        pytest.param(10, 0.41, 1, 5, id="rounded-up"),
        pytest.param(10, 0.01, 1, 1, id="at-least-one"),
        pytest.param(10, 0.2, 4, 4, id="min-sites-is-a-floor"),
        pytest.param(100, 0.07, 1, 7, id="7-percent-of-100-is-7-not-8"),
        pytest.param(3, 1.0, 3, 3, id="exactly-enough"),
    ],
)
def test_a_cohort_has_the_fraction_rounded_up_but_no_fewer_than_min_sites(
    connected, fraction, min_sites, size
):
    chosen = cohort_of(HUNDRED[:connected], fraction=fraction, min_sites=min_sites)
    assert len(chosen) == len(set(chosen)) == size
    assert set(chosen) <= set(HUNDRED[:connected])


def test_the_order_of_arrival_does_not_matter():
    forward = cohort_of(dict.fromkeys(HUNDRED), fraction=0.2)
    backward = cohort_of(dict.fromkeys(reversed(HUNDRED)), fraction=0.2)
    assert forward == backward == tuple(sorted(forward))


def test_another_process_draws_the_same_cohort():
    code = (
        "from fedloom_common.runspec import Cohort; from fedloom_server.selection import select;"
        "sites = {f'site-{number:02}' for number in range(100)};"
        "print(*select(sites, cohort=Cohort(fraction=0.1), seed=7, round=3, attempt=1))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(answer.stdout.split()) == cohort_of(HUNDRED, fraction=0.1, seed=7, number=3)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"number": 2}, {"attempt": 2}])
def test_another_seed_round_or_attempt_draws_another_cohort(changed):
    assert cohort_of(HUNDRED, fraction=0.2) != cohort_of(HUNDRED, fraction=0.2, **changed)


def test_over_many_rounds_every_site_is_drawn_about_equally_often():
    rounds = 2000
    drawn = Counter(
        site for number in range(rounds) for site in cohort_of(HUNDRED[:10], fraction=0.3, number=number)
    )
    # Binomial with p = 0.3: mean 600, standard deviation 20.5; five of them to each side.
    assert set(drawn) == set(HUNDRED[:10])
    assert all(abs(count - 600) < 103 for count in drawn.values())


def test_too_few_connected_sites_are_named():
    with pytest.raises(
        TooFewUpdates, match=r"2 sites are connected \(a, b\), round 4 needs 3 \(cohort.min_sites\)"
    ):
        cohort_of(["b", "a"], min_sites=3, number=4)


def test_no_connected_site_is_an_error():
    with pytest.raises(TooFewUpdates, match=r"0 sites are connected \(none\)"):
        cohort_of([])
