"""What every aggregator must hold to, whatever its rule."""

import os
from typing import get_args

import numpy as np
import pytest
import torch
from peaks import peak_bytes, zeros
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedloom_common.errors import BadTensor, TooFewUpdates
from fedloom_common.runspec import Aggregation, AnyRule
from fedloom_common.tensors import encode_header
from fedloom_server.aggregation import Update, aggregator_for, pieces

RULES = {
    "weighted_mean": {},
    "median": {},
    "trimmed_mean": {"byzantine": 1},
    "krum": {"byzantine": 1},
    "multi_krum": {"byzantine": 1},
    "geometric_median": {},
}
ENOUGH = 5  # updates, for every rule above


@pytest.fixture(params=RULES)
def rule(request):
    return {"name": request.param, **RULES[request.param]}


@pytest.fixture
def aggregator(rule):
    return aggregator_for(Aggregation(rule=rule))


def test_every_rule_of_a_run_spec_is_held_to_this():
    assert set(RULES) == {kind.model_fields["name"].default for kind in get_args(AnyRule)}


def model(scale=1.0):
    return {
        "b": torch.arange(6, dtype=torch.float32).reshape(2, 3) * scale,
        "a": torch.full((5,), scale, dtype=torch.bfloat16),
        "steps": torch.tensor([7, 9]),
    }


def saved(folder, name, tensors, examples=1):
    path = folder / f"{name}.safetensors"
    save_file(tensors, path, {"format": "pt"})
    return Update(site=name, path=path, examples=examples)


def drawn(folder, count=ENOUGH):
    """Random updates of the model's tensors."""
    generator = torch.Generator().manual_seed(0)
    for k in range(count):
        tensors = {
            name: torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else t
            for name, t in model().items()
        }
        yield saved(folder, f"site-{k}", tensors, 10 + k)


def alike(folder, tensors, count=ENOUGH):
    return [saved(folder, f"site-{k}", tensors, 1 + 10**k) for k in range(count)]


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.safetensors"
    save_file(model(), path, {"format": "pt", "origin": "round 3"})
    return path


def test_equal_updates_give_the_same_model(aggregator, base, tmp_path):
    aggregator.aggregate(base, alike(tmp_path, model(2.3)), tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out").items():
        assert torch.equal(tensor, model(2.3)[name])


def test_names_shapes_types_order_and_metadata_are_the_base_models(aggregator, base, tmp_path):
    aggregator.aggregate(base, alike(tmp_path, model(3.0)), tmp_path / "out")
    with safe_open(base, "pt") as wanted, safe_open(tmp_path / "out", "pt") as came:
        assert came.metadata() == wanted.metadata() == {"format": "pt", "origin": "round 3"}
        assert came.offset_keys() == wanted.offset_keys()
        for name in wanted.keys():  # noqa: SIM118 (not a mapping)
            assert came.get_tensor(name).shape == wanted.get_tensor(name).shape
            assert came.get_tensor(name).dtype == wanted.get_tensor(name).dtype


def test_tensors_that_are_not_floats_are_the_base_models(aggregator, base, tmp_path):
    updates = alike(tmp_path, model(2.0) | {"steps": torch.tensor([100, 200])})
    aggregator.aggregate(base, updates, tmp_path / "out")
    assert load_file(tmp_path / "out")["steps"].tolist() == [7, 9]


def test_tensors_are_matched_by_name_wherever_they_lie_in_the_file(aggregator, base, tmp_path):
    path = tmp_path / "reversed.safetensors"
    tensors = dict(reversed(model(4.0).items()))
    kinds = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16"}
    header = encode_header(
        [(name, kinds[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    )
    path.write_bytes(
        header + b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    )
    updates = [Update(site=f"{k}", path=path, examples=1) for k in range(ENOUGH)]
    aggregator.aggregate(base, updates, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out")["b"], model(4.0)["b"])
    assert torch.equal(load_file(tmp_path / "out")["a"], model(4.0)["a"])


@pytest.mark.parametrize("sites", [ENOUGH, 6, 17, 18])
def test_scalars_and_tensors_without_values_are_kept(aggregator, tmp_path, sites):
    tensors = {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "one": torch.tensor([2.0])}
    base = saved(tmp_path, "base", tensors).path
    halves = {name: tensor / 2 for name, tensor in tensors.items()}
    aggregator.aggregate(base, [saved(tmp_path, f"{k}", halves) for k in range(sites)], tmp_path / "out")
    came = load_file(tmp_path / "out")
    assert (came["scalar"].item(), came["one"].tolist(), came["empty"].shape) == (0.75, [1.0], (0, 3))


def test_the_same_updates_in_the_same_order_give_the_same_bytes(aggregator, base, tmp_path):
    updates = list(drawn(tmp_path))
    aggregator.aggregate(base, updates, tmp_path / "first")
    aggregator.aggregate(base, updates, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_the_bytes_do_not_depend_on_the_number_of_threads(aggregator, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    paths = [
        saved(tmp_path, f"{k}", {"w": torch.randn(1 << 20, generator=generator)}, 1 + k)
        for k in range(ENOUGH)
    ]
    base = saved(tmp_path, "base", {"w": torch.zeros(1 << 20)}).path
    monkeypatch.setattr(pieces, "ALONE_BYTES", 0)
    monkeypatch.setattr(pieces, "TURN_PIECES", 1)
    models = []
    for cores in (1, 4):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        aggregator.aggregate(base, paths, tmp_path / "out")
        models.append((tmp_path / "out").read_bytes())
    assert models[0] == models[1]


@pytest.mark.parametrize("groups", [[3, 2], [1, 1, 1, 1, 1], [5]])
def test_updates_folded_before_give_the_same_bytes(base, tmp_path, groups):
    aggregator = aggregator_for(Aggregation())
    updates = list(drawn(tmp_path))
    aggregator.aggregate(base, updates, tmp_path / "at-once")
    earlier, rest = None, list(updates)
    for number, count in enumerate(groups):
        out = tmp_path / f"sum-{number}"
        aggregator.fold(base, rest[:count], out, earlier=earlier)
        earlier, rest = out, rest[count:]
        aggregator.aggregate(base, rest, tmp_path / "in-steps", earlier=earlier)
        assert (tmp_path / "in-steps").read_bytes() == (tmp_path / "at-once").read_bytes()


def test_nothing_to_aggregate_is_an_error(aggregator, base, tmp_path):
    with pytest.raises(TooFewUpdates, match="no update"):
        aggregator.aggregate(base, [], tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "examples", "complaint"),
    [
        pytest.param({"b": None}, 1, "site y: tensor b is missing", id="missing-tensor"),
        pytest.param(
            {"b": torch.zeros(3)}, 1, r"site y: tensor b has shape \[3\], wanted \[2, 3\]", id="shape"
        ),
        pytest.param({"b": torch.zeros(2, 3).half()}, 1, "site y: tensor b has dtype F16", id="dtype"),
        pytest.param({"c": torch.zeros(1)}, 1, "site y: tensor c is not in the model", id="unknown-tensor"),
        pytest.param({}, 0, "site y claims 0 examples", id="no-examples"),
        pytest.param({}, -3, "site y claims -3 examples", id="negative-examples"),
        pytest.param({"b": torch.full((2, 3), torch.nan)}, 1, "tensor b is not finite", id="nan"),
        pytest.param(
            {"a": torch.full((5,), -torch.inf).bfloat16()}, 1, "tensor a is not finite", id="infinity"
        ),
    ],
)
def test_a_bad_update_leaves_the_model_that_was_there(
    aggregator, base, tmp_path, change, examples, complaint
):
    out = tmp_path / "out"
    out.write_bytes(b"the model of the round before")
    tensors = {name: tensor for name, tensor in (model() | change).items() if tensor is not None}
    updates = [*alike(tmp_path, model(), ENOUGH - 1), saved(tmp_path, "y", tensors, examples)]
    with pytest.raises(BadTensor, match=complaint):
        aggregator.aggregate(base, updates, out)
    assert out.read_bytes() == b"the model of the round before"
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_that_was_cut_short_names_its_site(aggregator, base, tmp_path):
    updates = alike(tmp_path, model())
    os.truncate(updates[3].path, updates[3].path.stat().st_size - 4)
    with pytest.raises(BadTensor, match=r"site site-3: the file has \d+ bytes"):
        aggregator.aggregate(base, updates, tmp_path / "out")


def test_memory_does_not_grow_with_the_model_or_the_number_of_sites(rule, tmp_path):
    small = _peak_bytes(rule, tmp_path, tensor_bytes=1 << 20, sites=ENOUGH)
    large = _peak_bytes(rule, tmp_path, tensor_bytes=48 << 20, sites=2 * ENOUGH)
    assert large - small < 16 << 20


def _peak_bytes(rule, folder, *, tensor_bytes, sites):
    """Peak memory of a process that aggregates updates with one tensor of such a size."""
    code = f"""
from fedloom_common.runspec import Aggregation
from fedloom_server.aggregation import Update, aggregator_for
updates = [Update(site=str(k), path=path, examples=1 + k) for k in range({sites})]
aggregator_for(Aggregation(rule={rule!r})).aggregate(path, updates, path.with_name("out"))
"""
    return peak_bytes(code, zeros(folder, tensor_bytes))


@pytest.mark.parametrize("name", sorted(set(RULES) - {"weighted_mean"}))
def test_a_robust_rule_stays_with_the_honest_updates_whatever_a_few_others_say(name, tmp_path):
    honest_count, f = 5, 2
    rule = {"name": name} | ({"byzantine": f} if RULES[name] else {})
    rng = np.random.default_rng(5)
    base = saved(tmp_path, "base", {"w": torch.zeros(50)}).path
    honest = [rng.normal(size=50).astype(np.float32) for _ in range(honest_count)]
    for attack in (np.full(50, 3e38), np.where(np.arange(50) % 2, 3e38, -3e38), rng.normal(size=50) * 1e4):
        values = [attack, *honest, attack]
        updates = [
            saved(tmp_path, f"{k}", {"w": torch.from_numpy(np.asarray(v, np.float32))})
            for k, v in enumerate(values)
        ]
        aggregator_for(Aggregation(rule=rule)).aggregate(base, updates, tmp_path / "out")
        came = load_file(tmp_path / "out")["w"].numpy()
        if name == "geometric_median":  # Lopuhaä and Rousseeuw 1991: within 2(1-q)/(1-2q) radii, q = f/n
            centre, share = np.mean(honest, axis=0), f / len(values)
            radius = max(np.linalg.norm(update - centre) for update in honest)
            assert np.linalg.norm(came - centre) <= 2 * (1 - share) / (1 - 2 * share) * radius
        else:
            assert (came >= np.min(honest, axis=0)).all()
            assert (came <= np.max(honest, axis=0)).all()
        aggregator_for(Aggregation()).aggregate(base, updates, tmp_path / "mean")
        assert np.abs(load_file(tmp_path / "mean")["w"].numpy()).max() > 100


@pytest.mark.parametrize("name", ["trimmed_mean", "krum", "multi_krum"])
def test_fewer_updates_than_the_rule_needs_are_an_error(name, base, tmp_path):
    aggregator = aggregator_for(Aggregation(rule={"name": name, "byzantine": 2}))
    with pytest.raises(TooFewUpdates, match=rf"4 updates came, {name} needs [57] or more"):
        aggregator.aggregate(base, list(drawn(tmp_path, 4)), tmp_path / "out")
