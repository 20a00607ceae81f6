"""What every aggregator must hold to, whatever its rule."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedloom_common.errors import BadTensor, TooFewUpdates
from fedloom_common.runspec import Aggregation
from fedloom_common.tensors import encode_header
from fedloom_server.aggregation import Update, aggregator_for

RULES = Aggregation.model_fields["rule"].annotation.__args__


@pytest.fixture(params=RULES)
def rule(request):
    return request.param


@pytest.fixture
def aggregator(rule):
    return aggregator_for(Aggregation(rule=rule))


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


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.safetensors"
    save_file(model(), path, {"format": "pt", "origin": "round 3"})
    return path


def test_equal_updates_give_the_same_model(aggregator, base, tmp_path):
    updates = [
        saved(tmp_path, name, model(2.5), examples) for name, examples in [("x", 3), ("y", 10**9), ("z", 1)]
    ]
    aggregator.aggregate(base, updates, tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out").items():
        assert torch.equal(tensor, model(2.5)[name])


def test_names_shapes_types_order_and_metadata_are_the_base_models(aggregator, base, tmp_path):
    aggregator.aggregate(base, [saved(tmp_path, "x", model(3.0))], tmp_path / "out")
    with safe_open(base, "pt") as wanted, safe_open(tmp_path / "out", "pt") as came:
        assert came.metadata() == wanted.metadata() == {"format": "pt", "origin": "round 3"}
        assert came.offset_keys() == wanted.offset_keys()
        for name in wanted.keys():  # noqa: SIM118 (not a mapping)
            assert came.get_tensor(name).shape == wanted.get_tensor(name).shape
            assert came.get_tensor(name).dtype == wanted.get_tensor(name).dtype


def test_tensors_that_are_not_floats_are_the_base_models(aggregator, base, tmp_path):
    update = saved(tmp_path, "x", model(2.0) | {"steps": torch.tensor([100, 200])})
    aggregator.aggregate(base, [update], tmp_path / "out")
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
    aggregator.aggregate(base, [Update(site="x", path=path, examples=1)], tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out")["b"], model(4.0)["b"])
    assert torch.equal(load_file(tmp_path / "out")["a"], model(4.0)["a"])


def test_the_same_updates_in_the_same_order_give_the_same_bytes(aggregator, base, tmp_path):
    torch.manual_seed(0)
    updates = []
    for k in range(5):
        tensors = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in model().items()}
        updates.append(saved(tmp_path, f"site-{k}", tensors, 10 + k))
    aggregator.aggregate(base, updates, tmp_path / "first")
    aggregator.aggregate(base, updates, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize("groups", [[3, 2], [1, 1, 1, 1, 1], [5]])
def test_updates_folded_before_give_the_same_bytes(aggregator, base, tmp_path, groups):
    torch.manual_seed(0)
    updates = []
    for k in range(5):
        tensors = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in model().items()}
        updates.append(saved(tmp_path, f"site-{k}", tensors, 10 + k))
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
    updates = [saved(tmp_path, "x", model()), saved(tmp_path, "y", tensors, examples)]
    with pytest.raises(BadTensor, match=complaint):
        aggregator.aggregate(base, updates, out)
    assert out.read_bytes() == b"the model of the round before"
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_that_was_cut_short_names_its_site(aggregator, base, tmp_path):
    update = saved(tmp_path, "x", model())
    os.truncate(update.path, update.path.stat().st_size - 4)
    with pytest.raises(BadTensor, match=r"site x: the file has \d+ bytes"):
        aggregator.aggregate(base, [update], tmp_path / "out")


def test_memory_does_not_grow_with_the_model_or_the_number_of_sites(rule, tmp_path):
    small = _peak_bytes(rule, tmp_path, tensor_bytes=1 << 20, sites=1)
    large = _peak_bytes(rule, tmp_path, tensor_bytes=128 << 20, sites=8)
    assert large - small < 12 << 20


def _peak_bytes(rule, folder, *, tensor_bytes, sites):
    """Peak memory of a process that aggregates updates with one tensor of such a size."""
    path = folder / "zeros.safetensors"
    with path.open("wb") as file:
        file.write(encode_header([("w", "F32", (tensor_bytes // 4,))]))
        file.truncate(file.tell() + tensor_bytes)
    code = f"""
import resource
from pathlib import Path
from fedloom_common.runspec import Aggregation
from fedloom_server.aggregation import Update, aggregator_for
path = Path({str(path)!r})
updates = [Update(site=str(k), path=path, examples=1 + k) for k in range({sites})]
aggregator_for(Aggregation(rule={rule!r})).aggregate(path, updates, path.with_name("out"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(answer.stdout)
