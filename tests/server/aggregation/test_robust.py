"""Robust rules against their definitions, computed by numpy on whole vectors."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import decode_model
from fedloom_common.codecs.encoder import encode_model
from fedloom_common.codecs.spec import Codecs
from fedloom_common.digests import digest_of_file
from fedloom_common.errors import BadTensor
from fedloom_common.runspec import Aggregation, GeometricMedianRule
from fedloom_common.tensorfiles import TensorFile
from fedloom_server.aggregation import BaseModel, Update, aggregator_for
from fedloom_server.aggregation.geometricmedian import geometric_median_shares
from fedloom_server.aggregation.ordering import comparisons, sort_columns
from fedloom_server.aggregation.pieces import PIECE_VALUES

seeds = st.integers(0, 1 << 32)


def median_of(vectors, _examples):
    return np.median(vectors, axis=0)


def trimmed_mean_of(cut):
    def of(vectors, _examples):
        return np.sort(vectors, axis=0)[cut : len(vectors) - cut].mean(axis=0)

    return of


def krum_scores_of(vectors, f):
    scores = []
    for i, one in enumerate(vectors):
        distances = sorted(((one - other) ** 2).sum() for j, other in enumerate(vectors) if j != i)
        scores.append(sum(distances[: len(vectors) - f - 2]))
    return np.array(scores)


def krum_of(f):
    return lambda vectors, _examples: vectors[np.argmin(krum_scores_of(vectors, f))]


def multi_krum_of(f, m, weighted=False):
    def of(vectors, examples):
        best = np.argsort(krum_scores_of(vectors, f))[: m or len(vectors) - f - 2]
        return np.average(vectors[best], axis=0, weights=np.array(examples)[best] if weighted else None)

    return of


def weiszfeld_of(weights_of, smoothing):
    def of(vectors, examples):
        weights = weights_of(np.array(examples, float))
        point = (weights[:, None] * vectors).sum(axis=0) / weights.sum()
        for _ in range(GeometricMedianRule().iterations):  # where an update is nearly the median, all of them
            pulls = weights / np.maximum(smoothing, np.linalg.norm(vectors - point, axis=1))
            before, point = point, (pulls[:, None] * vectors).sum(axis=0) / pulls.sum()
            if np.linalg.norm(point - before) <= 1e-11:
                break
        return point

    return of


RULES = {
    "median": ({"name": "median"}, median_of),
    "trimmed-mean-by-count": ({"name": "trimmed_mean", "byzantine": 2}, trimmed_mean_of(2)),
    "trimmed-mean-by-share": ({"name": "trimmed_mean", "trim": 0.15}, trimmed_mean_of(1)),
    "krum": ({"name": "krum", "byzantine": 2}, krum_of(2)),
    "multi-krum": ({"name": "multi_krum", "byzantine": 1, "selected": 3}, multi_krum_of(1, 3)),
    "multi-krum-weighted": (
        {"name": "multi_krum", "byzantine": 1, "selected": 4, "weighted": True},
        multi_krum_of(1, 4, weighted=True),
    ),
    "multi-krum-n-f-2": ({"name": "multi_krum", "byzantine": 2}, multi_krum_of(2, None)),
    "geometric-median": (
        {"name": "geometric_median"},
        weiszfeld_of(lambda examples: examples, 1e-6),
    ),
    "geometric-median-unweighted": (
        {"name": "geometric_median", "weighted": False, "smoothing": 0.5},
        weiszfeld_of(np.ones_like, 0.5),
    ),
}
SITES = 9
SHAPES = {"w": (40, 7), "scalar": (), "half": (33,), "empty": (0, 2)}
DTYPES = {"half": torch.bfloat16}


def drawn(generator, scale=1.0):
    return {
        name: (scale * torch.randn(shape, generator=generator)).to(DTYPES.get(name, torch.float32))
        for name, shape in SHAPES.items()
    }


def flat(tensors):
    return np.concatenate([tensors[name].double().numpy().reshape(-1) for name in SHAPES])


def saved(path, tensors):
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", RULES)
@given(seed=seeds, sites=st.sampled_from([SITES, SITES - 1]))  # an even number has two in the middle
@example(seed=508215, sites=SITES)  # the geometric median is not at its place after all steps
@settings(max_examples=12)
def test_a_rule_is_its_definition(tmp_path_factory, name, seed, sites):
    folder, generator = tmp_path_factory.mktemp("rule"), torch.Generator().manual_seed(seed)
    spec, reference = RULES[name]
    base = saved(folder / "base", drawn(generator))
    tensors = [drawn(generator, 10.0**-k if k < 3 else 1.0) for k in range(sites)]
    examples = [1 + int(number) for number in torch.randint(0, 50, (sites,), generator=generator)]
    updates = [
        Update(site=f"{k}", path=saved(folder / f"{k}", tensors[k]), examples=examples[k])
        for k in range(sites)
    ]
    aggregator_for(Aggregation(rule=spec)).aggregate(base, updates, folder / "out")
    wanted = reference(np.stack([flat(update) for update in tensors]), examples)
    came = load_file(folder / "out")
    place, near = 0, 1e-6 if "geometric" in name else 1e-8  # iterations end near the median, not at it
    for tensor_name, shape in SHAPES.items():
        part = wanted[place : place + int(np.prod(shape))].reshape(shape)
        place += part.size
        rounding = torch.finfo(came[tensor_name].dtype).eps
        np.testing.assert_allclose(came[tensor_name].double().numpy(), part, rtol=rounding, atol=near)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("chain", ["int8", ["topk", "int8", "zstd"]], ids=str)
def test_a_rule_on_encoded_updates_is_that_on_the_models_that_they_decode_to(tmp_path, name, chain):
    spec, reference = RULES[name]
    stages, generator = TypeAdapter(Codecs).validate_python(chain), torch.Generator().manual_seed(3)
    shape = (PIECE_VALUES + 77,)
    start = torch.randn(shape, generator=generator)
    base = saved(tmp_path / "base", {"w": start})
    digest, updates, vectors = digest_of_file(base), [], []
    for k in range(SITES):
        trained, out, decoded = (tmp_path / f"{kind}-{k}" for kind in ("trained", "encoded", "decoded"))
        save_file({"w": start + torch.randn(shape, generator=generator) / 9}, trained)
        with TensorFile(trained) as model, TensorFile(base) as before:
            encode_model(Chain(stages), trained=model, base=before, base_digest=digest, out=out)
            decode_model(out, Chain(stages), base=before, base_digest=digest, out=decoded)
        vectors.append(load_file(decoded)["w"].double().numpy())
        updates.append(Update(site=f"{k}", path=out, examples=1 + k))
    aggregator_for(Aggregation(rule=spec), stages, digest).aggregate(base, updates, tmp_path / "out")
    wanted = reference(np.stack(vectors), [update.examples for update in updates])
    came = load_file(tmp_path / "out")["w"].double().numpy()
    np.testing.assert_allclose(came, wanted, rtol=4e-7, atol=4e-7)  # decoding rounds each model once more


def test_stale_updates_join_with_their_scaled_change(tmp_path):
    old = BaseModel(path=saved(tmp_path / "old", {"w": torch.tensor([0.0])}), digest="")
    base = saved(tmp_path / "base", {"w": torch.tensor([10.0])})
    fresh = [("a", 11.0), ("b", 15.0)]
    updates = [
        Update(site=name, path=saved(tmp_path / name, {"w": torch.tensor([value])}), examples=1)
        for name, value in fresh
    ]
    path = saved(tmp_path / "c", {"w": torch.tensor([6.0])})  # its change of 6 counts half: 10 + 3
    updates.append(Update(site="c", path=path, examples=1, base=old, factor=0.5))
    aggregator_for(Aggregation(rule="median")).aggregate(base, updates, tmp_path / "out")
    assert load_file(tmp_path / "out")["w"].tolist() == [13.0]


@given(st.integers(2, 7), st.integers(1, 30), seeds)
@settings(max_examples=25)
def test_no_small_step_shortens_the_distances_to_the_geometric_median(sites, values, seed):
    rng = np.random.default_rng(seed)
    vectors, examples = rng.normal(size=(sites, values)), rng.integers(1, 20, sites)
    rule = GeometricMedianRule(smoothing=1e-9, iterations=3000)
    shares = geometric_median_shares(vectors @ vectors.T, examples.tolist(), rule)
    assert shares.sum() == pytest.approx(1)

    def cost(point):
        return (examples * np.linalg.norm(vectors - point, axis=1)).sum()

    point = shares @ vectors
    for _ in range(20):
        step = rng.normal(size=values)
        assert cost(point + 1e-3 * step / np.linalg.norm(step)) >= cost(point) - 1e-6 * cost(point)


@pytest.mark.parametrize("scale", [1e3, 1e20, 1e30])
@pytest.mark.parametrize(
    ("examples", "bad"),
    [
        pytest.param([26, 25, 49], [2], id="nearly-half-of-the-weight"),
        pytest.param([1] * 31, range(16, 31), id="fifteen-of-31"),
        pytest.param([10, 10, 19], [2], id="two-that-are-alike"),
    ],
)
def test_a_geometric_median_stays_with_the_good_however_far_the_bad_are(examples, bad, scale):
    """At most 2(1-q)/(1-2q) radii off, q being the bad ones' share (Lopuhaä and Rousseeuw 1991)."""
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(len(examples), 6))
    if len(examples) == 3 and examples[0] == examples[1]:
        vectors[1] = vectors[0]
    vectors[list(bad)] = scale * (1 + rng.random(6))
    shares = geometric_median_shares(vectors @ vectors.T, examples, GeometricMedianRule())
    good = [k for k in range(len(examples)) if k not in bad]
    radius = max(np.linalg.norm(vectors[k] - vectors[good].mean(axis=0)) for k in good)
    q = sum(examples[k] for k in bad) / sum(examples)
    off = np.linalg.norm(shares @ vectors - vectors[good].mean(axis=0))
    assert off <= 2 * (1 - q) / (1 - 2 * q) * radius + 1e-5


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_two_updates_that_are_alike_do_not_hold_the_geometric_median(scale):
    """Two pull up and one down, so the pulls are even where the two at the sides make 2y/sqrt(1+y^2) = 1."""
    vectors = scale * np.array([[0, 0.8], [0, 0.8], [-1, 0], [1, 0], [0, -0.5]])
    shares = geometric_median_shares(vectors @ vectors.T, [1] * 5, GeometricMedianRule())
    np.testing.assert_allclose(shares @ vectors, [0, scale / np.sqrt(3)], atol=1e-5 * scale)


def test_krum_takes_one_update_whole(tmp_path):
    values = [5.0, 0.1, 0.0, -0.1, 9.0, 0.05, 0.02]
    updates = [
        Update(site=f"{k}", path=saved(tmp_path / f"{k}", {"w": torch.tensor([value])}), examples=1)
        for k, value in enumerate(values)
    ]
    base = saved(tmp_path / "base", {"w": torch.tensor([0.0])})
    rule = {"name": "krum", "byzantine": 2}
    aggregator_for(Aggregation(rule=rule)).aggregate(base, updates, tmp_path / "out")
    # the sums over three neighbours: of 0.02  .02² + .03² + .08²; of 0.05  .03² + .05² + .05²
    assert load_file(tmp_path / "out")["w"].item() == np.float32(0.05)


def test_a_change_whose_square_leaves_the_range_names_its_site(tmp_path):
    base = saved(tmp_path / "base", {"w": torch.zeros(2, dtype=torch.float64)})
    huge = saved(tmp_path / "huge", {"w": torch.full((2,), 1e200, dtype=torch.float64)})
    updates = [Update(site=f"{k}", path=base, examples=1) for k in range(2)]
    updates.append(Update(site="far", path=huge, examples=1))
    with pytest.raises(BadTensor, match="site far is too far"):
        aggregator_for(Aggregation(rule="geometric_median")).aggregate(base, updates, tmp_path / "out")


@pytest.mark.parametrize("rows", range(1, 17))
def test_comparisons_sort_every_order_of_zeros_and_ones(rows):
    """Then they sort everything: the 0-1 principle, Knuth 5.3.4."""
    bits = (np.arange(1 << rows)[None, :] >> np.arange(rows)[:, None]) & 1
    matrix = bits.astype(np.int8)
    for one, other in comparisons(rows):
        matrix[[one, other]] = np.sort(matrix[[one, other]], axis=0)
    assert (np.diff(matrix, axis=0) >= 0).all()
    assert (matrix.sum(axis=0) == bits.sum(axis=0)).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 40])
def test_columns_are_sorted_whatever_their_number(rows):
    matrix = np.random.default_rng(rows).normal(size=(rows, 50))
    assert np.array_equal(sort_columns(matrix.copy()), np.sort(matrix, axis=0))
