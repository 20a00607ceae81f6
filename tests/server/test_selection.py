import hashlib
import math
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom_common.errors import BadSpec, TooFewUpdates
from fedloom_common.runspec import Cohort
from fedloom_server.selection import POLICIES, Draw, cohort_size, find_policy, known_weights, select

HUNDRED = [f"site-{number:02}" for number in range(100)]


def draw_of(sites, *, count, seed=0, number=1, attempt=1, **known):
    return Draw(sites=tuple(sorted(sites)), count=count, seed=seed, round=number, attempt=attempt, **known)


def cohort_of(connected, *, fraction=1.0, min_sites=1, policy="uniform", **draw):
    cohort = Cohort(fraction=fraction, min_sites=min_sites, policy=policy)
    return select(draw_of(connected, count=cohort_size(cohort, len(connected)), **draw), cohort)


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


SITES = st.sets(st.from_regex(r"[a-z0-9][a-z0-9-]{0,8}", fullmatch=True), min_size=1, max_size=30)


@st.composite
def draws(draw):
    sites = sorted(draw(SITES))
    some = st.sampled_from(sites)
    return Draw(
        sites=tuple(sites),
        count=draw(st.integers(1, len(sites))),
        seed=draw(st.integers(0, 2**63 - 1)),
        round=draw(st.integers(1, 10**6)),
        attempt=draw(st.integers(1, 100)),
        weights=draw(st.dictionaries(some, st.floats(0, 1e15))),
        last_picked=draw(st.dictionaries(some, st.integers(1, 10**12))),
    )


@pytest.mark.parametrize("policy", POLICIES)
class TestEveryPolicy:
    @given(draw=draws())
    def test_picks_as_many_different_sites_as_asked_in_the_order_of_names(self, policy, draw):
        if policy == "all":
            draw = draw_of(draw.sites, count=len(draw.sites))
        chosen = select(draw, Cohort(policy=policy, min_sites=draw.count))
        assert chosen == tuple(sorted(set(chosen)))
        assert len(chosen) == draw.count
        assert set(chosen) <= set(draw.sites)

    @given(draw=draws(), shuffle=st.randoms())
    def test_depends_only_on_what_the_draw_says_not_on_the_order_in_which_it_says_it(
        self, policy, draw, shuffle
    ):
        def shuffled(known):
            pairs = list(known.items())
            shuffle.shuffle(pairs)
            return dict(pairs)

        other = Draw(
            sites=draw.sites, count=draw.count, seed=draw.seed, round=draw.round, attempt=draw.attempt,
            weights=shuffled(draw.weights), last_picked=shuffled(draw.last_picked),
        )  # fmt: skip
        assert sorted(POLICIES[policy](draw)) == sorted(POLICIES[policy](other))


def test_another_process_draws_the_same_cohort():
    code = (
        "from fedloom_server.selection import Draw, uniform;"
        "sites = {f'site-{number:02}' for number in range(100)};"
        "print(*sorted(uniform(Draw(sites=tuple(sites), count=10, seed=7, round=3, attempt=1))))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(answer.stdout.split()) == cohort_of(HUNDRED, fraction=0.1, seed=7, number=3)


def test_uniform_gives_the_lowest_hashes_of_seed_round_attempt_and_name():
    hashes = {name: hashlib.sha256(f"cohort/7/3/2/{name}".encode()).hexdigest() for name in HUNDRED}
    lowest = sorted(HUNDRED, key=hashes.__getitem__)[:20]
    assert cohort_of(HUNDRED, fraction=0.2, seed=7, number=3, attempt=2) == tuple(sorted(lowest))


@pytest.mark.parametrize("policy", ["uniform", "weighted"])
@pytest.mark.parametrize("changed", [{"seed": 1}, {"number": 2}, {"attempt": 2}])
def test_another_seed_round_or_attempt_draws_another_cohort(policy, changed):
    weights = dict.fromkeys(HUNDRED, 3.0)
    first = cohort_of(HUNDRED, fraction=0.2, policy=policy, weights=weights)
    assert first != cohort_of(HUNDRED, fraction=0.2, policy=policy, weights=weights, **changed)


def test_over_many_rounds_every_site_is_drawn_about_equally_often():
    rounds = 2000
    drawn = Counter(
        site for number in range(rounds) for site in cohort_of(HUNDRED[:10], fraction=0.3, number=number)
    )
    # Binomial with p = 0.3: mean 600, standard deviation 20.5; five of them to each side.
    assert set(drawn) == set(HUNDRED[:10])
    assert all(abs(count - 600) < 103 for count in drawn.values())


def test_weighted_draws_sites_as_often_as_successive_draws_in_proportion_to_their_weights_would():
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    # Two of three, without replacement: P(first, second) = w1/8 * w2/(8 - w1).
    expected = {
        pair: weights[x] / 8 * weights[y] / (8 - weights[x]) + weights[y] / 8 * weights[x] / (8 - weights[y])
        for pair in (("a", "b"), ("a", "c"), ("b", "c"))
        for x, y in [pair]
    }
    rounds = 4000
    drawn = Counter(
        cohort_of("abc", fraction=0.6, policy="weighted", number=number, weights=weights)
        for number in range(rounds)
    )
    for pair, share in expected.items():
        deviation = math.sqrt(rounds * share * (1 - share))
        assert abs(drawn[pair] - rounds * share) < 5 * deviation


def test_a_site_of_no_weight_comes_last():
    known = {"count": 2, "weights": {"a": 4.0, "b": 0.0, "c": 1.0}}
    assert {select(draw_of("abc", seed=seed, **known), Cohort(policy="weighted")) for seed in range(50)} == {
        ("a", "c")
    }


def test_weights_are_examples_only_where_every_site_has_some():
    data_bytes = {"a": 500, "b": 100}
    assert known_weights("ab", {"a": 10, "b": 30}, data_bytes) == {"a": 10.0, "b": 30.0}
    assert known_weights("ab", {"a": 10}, data_bytes) == {"a": 500.0, "b": 100.0}
    assert known_weights("ab", {"a": 10, "b": 0}, data_bytes) == {"a": 500.0, "b": 100.0}


def test_round_robin_takes_new_sites_first_and_then_who_has_waited_longest():
    last_picked = {"a": 9, "b": 4, "d": 7}
    draw = {"policy": "round_robin", "last_picked": last_picked}
    assert cohort_of("abcd", fraction=0.25, **draw) == ("c",)
    assert cohort_of("abcd", fraction=0.5, **draw) == ("b", "c")
    assert cohort_of("abcd", fraction=0.75, **draw) == ("b", "c", "d")


def test_with_round_robin_nobody_waits_longer_than_a_cycle():
    last_picked = {}
    for number in range(1, 60):
        chosen = cohort_of(
            HUNDRED[:10], fraction=0.3, policy="round_robin", number=number, last_picked=last_picked
        )
        last_picked |= dict.fromkeys(chosen, number)
        waits = [number - last_picked.get(site, 0) for site in HUNDRED[:10]]
        assert max(waits) < 4  # rounds of 3 among 10


def test_too_few_sites_are_named():
    with pytest.raises(TooFewUpdates, match=r"2 sites fit \(a, b\), round 4 needs 3 \(cohort.min_sites\)"):
        cohort_of(["b", "a"], min_sites=3, number=4)


def test_no_site_is_an_error():
    with pytest.raises(TooFewUpdates, match=r"0 sites fit \(none\)"):
        cohort_of([])


def test_an_unknown_policy_is_an_error_that_lists_what_there_is():
    with pytest.raises(
        BadSpec, match="no policy 'fastest'; the coordinator has all, round_robin, uniform, we"
    ):
        find_policy("fastest")


PLUGIN = """
def greedy(draw):
    return draw.sites

def forger(draw):
    return ["mallory"] * draw.count
"""
DOCUMENT = Path(__file__).resolve().parents[2] / "docs/operations/sites.md"


def install(folder, name, modules, entries):
    """Install a distribution that brings policies, as pip does with a wheel."""
    facts = folder / f"{name}-1.0.dist-info"
    facts.mkdir(parents=True)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{policy} = {target}" for policy, target in entries.items()]
    (facts / "entry_points.txt").write_text("\n".join(["[fedloom.selection]", *lines, ""]))


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The document's own example, and policies that break their word."""
    example = DOCUMENT.read_text()
    (code,) = re.findall(r"```python\n(# ourpicks.py.*?)```", example, re.DOTALL)
    (project,) = re.findall(r"```toml\n(# pyproject.toml.*?)```", example, re.DOTALL)
    entries = tomllib.loads(project)["project"]["entry-points"]["fedloom.selection"]
    install(tmp_path / "site-packages", "example", {"ourpicks": code}, entries)
    bad = {"greedy": "badpicks:greedy", "forger": "badpicks:forger", "broken": "badpicks:missing"}
    install(tmp_path / "site-packages", "bad", {"badpicks": PLUGIN}, bad)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    yield
    for module in ("ourpicks", "badpicks"):
        sys.modules.pop(module, None)


@pytest.mark.usefixtures("plugin")
def test_the_documents_plug_in_picks_once_it_is_installed():
    weights = {"a": 1.0, "b": 7.0, "c": 2.0, "d": 7.0}
    assert cohort_of("dcba", fraction=0.75, policy="largest", weights=weights) == ("b", "c", "d")
    with pytest.raises(BadSpec, match=r"has all, broken, forger, greedy, largest, round_robin, uniform, we"):
        find_policy("fastest")


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ("greedy", "'greedy' picked a, b, c, d where 2 different ones of a, b, c, d were wanted"),
        ("forger", "'forger' picked mallory, mallory where 2"),
        ("broken", "the plug-in 'broken' cannot be loaded: .*missing"),
    ],
)
def test_a_plug_in_that_breaks_its_word_is_an_error(policy, told):
    with pytest.raises(BadSpec, match=told):
        cohort_of("abcd", fraction=0.5, policy=policy)
