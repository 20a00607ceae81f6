import math

import numpy as np
import pytest

from fedloom_client.splitting.census import Census, Coded
from fedloom_client.splitting.rules import apportion, dirichlet, grouped, iid, numbered, plain_names
from fedloom_client.splitting.skew import distance, mean_distance, shares_of
from fedloom_common.errors import BadSpec


def coded(*values: str) -> Coded:
    names = tuple(dict.fromkeys(values))
    return Coded(codes=np.array([names.index(value) for value in values], np.int32), values=names)


def census(records: int, label: Coded | None = None) -> Census:
    return Census(
        names=("a.jsonl",),
        files=np.zeros(records, np.int32),
        sizes=np.full(records, 10, np.uint32),
        columns={} if label is None else {"label": label},
    )


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [
        (10, [0.5, 0.3, 0.2], [5, 3, 2]),
        (10, [1, 1, 1], [4, 3, 3]),
        (7, [0.1, 0.45, 0.45], [1, 3, 3]),  # 0.7, 3.15, 3.15: the rest of 1 goes to 0.7
        (1, [0.4, 0.6], [0, 1]),
        (0, [0.4, 0.6], [0, 0]),
    ],
)
def test_counts_are_those_of_largest_remainders(total, shares, counts):
    assert apportion(total, np.array(shares)).tolist() == counts


def test_an_iid_split_has_the_sizes_that_were_asked_for_and_is_the_same_for_the_same_seed():
    split = iid(census(10), [0.5, 0.3, 0.2], seed=1)
    assert np.bincount(split.sites).tolist() == [5, 3, 2]
    assert split.sites.tolist() == iid(census(10), [0.5, 0.3, 0.2], seed=1).sites.tolist()
    assert split.sites.tolist() != iid(census(10), [0.5, 0.3, 0.2], seed=2).sites.tolist()
    assert split.sites.tolist() != sorted(split.sites.tolist())


def test_a_site_that_would_get_nothing_is_an_error():
    with pytest.raises(BadSpec, match="of 3 records site 2 of 2 would get none"):
        iid(census(3), [0.999, 0.001], seed=0)


def test_dirichlet_shares_out_every_record_of_every_label():
    label = coded(*["a"] * 50 + ["b"] * 30)
    split = dirichlet(label, 3, alpha=0.5, seed=4)
    assert len(split.sites) == 80
    assert set(split.sites.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_dirichlet_proportions_have_the_mean_and_variance_of_the_distribution(alpha):
    """E p = 1/K and Var p = (K−1)/(K²(Kα+1)), over 400 labels that are draws of their own."""
    sites, labels, each = 4, 400, 1000
    label = Coded(
        codes=np.repeat(np.arange(labels, dtype=np.int32), each), values=tuple(map(str, range(labels)))
    )
    split = dirichlet(label, sites, alpha=alpha, seed=11)
    pairs = np.bincount(label.codes * sites + split.sites, minlength=labels * sites).reshape(labels, sites)
    shares = pairs[:, 0] / each
    variance = (sites - 1) / (sites**2 * (sites * alpha + 1))
    assert abs(shares.mean() - 1 / sites) < 4 * math.sqrt(variance / labels)
    assert abs(shares.var() / variance - 1) < 0.35  # 400 draws: about 5 standard deviations at most


def test_dirichlet_mixes_the_records_of_a_label():
    split = dirichlet(coded(*["a"] * 200), 2, alpha=100, seed=0)
    for site in (0, 1):
        places = np.flatnonzero(split.sites == site)
        assert places.min() < 20
        assert places.max() > 180


def test_dirichlet_draws_until_every_site_has_enough():
    label = coded(*["a"] * 60 + ["b"] * 60)
    few = [np.bincount(dirichlet(label, 3, alpha=0.3, seed=s).sites, minlength=3).min() for s in range(20)]
    many = [np.bincount(dirichlet(label, 3, alpha=0.3, seed=s, at_least=15).sites).min() for s in range(20)]
    assert min(few) < 15 <= min(many)


def test_dirichlet_says_that_there_are_too_few_records():
    with pytest.raises(BadSpec, match="fewer than 30 of 60 records"):
        dirichlet(coded(*["a"] * 60), 3, alpha=0.1, seed=0, at_least=30)


def test_groups_are_sites_of_their_own():
    split = grouped(coded("Bergen", "Oslo", "Bergen"), np.array([1, 1, 1], np.uint32), None)
    assert split.names == ("bergen", "oslo")
    assert split.sites.tolist() == [0, 1, 0]


def test_groups_join_to_sites_alike_in_bytes():
    """7, 6, 5 and 4 bytes on two sites: 7+4 and 6+5."""
    split = grouped(coded("a", "b", "c", "d"), np.array([4, 7, 5, 6], np.uint32), 2)
    assert split.names == ("site-1", "site-2")
    assert split.sites.tolist() == [0, 0, 1, 1]


def test_fewer_groups_than_sites_are_an_error():
    with pytest.raises(BadSpec, match="there are 2 groups, too few for 3 sites"):
        grouped(coded("a", "b"), np.array([1, 1], np.uint32), 3)


def test_values_become_names_that_sites_may_have():
    assert plain_names(["Lady Macbeth", "lady macbeth!", "(nothing)", "***", "é", "Ø"]) == (
        "lady-macbeth", "lady-macbeth-2", "nothing", "site", "site-2", "site-3",
    )  # fmt: skip
    assert plain_names(["manifest.json"]) == ("manifest-json",)  # a file of that name lies beside the folders


def test_numbers_have_as_many_digits_as_the_last():
    assert numbered(10)[0] == "site-01"


def test_distance_is_total_variation():
    assert distance({"a": 3, "b": 1}, {"a": 1, "b": 1}) == pytest.approx(0.25)
    assert distance({"a": 2}, {"b": 5}) == 1.0
    assert distance({"a": 2, "b": 4}, {"a": 1, "b": 2}) == 0.0


def test_the_table_counts_labels_bytes_and_distances():
    """Site 1 has a a b, site 2 has b; all have 2 a and 2 b: distances 1/6 and 1/2, on average 1/4."""
    label = coded("a", "b", "a", "b")
    split = grouped(coded("x", "x", "x", "y"), np.array([1, 1, 1, 1], np.uint32), None)
    first, second = shares_of(census(4, label), split, "label")
    assert (first.examples, first.share, first.size_bytes, first.labels) == (3, 0.75, 30, {"a": 2, "b": 1})
    assert (second.examples, second.labels) == (1, {"b": 1})
    assert first.distance == pytest.approx(1 / 6)
    assert second.distance == pytest.approx(1 / 2)
    assert mean_distance([first, second]) == pytest.approx(1 / 4)
