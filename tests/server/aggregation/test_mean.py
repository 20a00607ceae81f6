import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedloom_server.aggregation import Update
from fedloom_server.aggregation.mean import PIECE_VALUES, WeightedMean

BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}

dtypes = st.sampled_from(list(BITS))
small_shapes = st.sampled_from([(), (0,), (3, 0, 2), (1,), (7,), (2, 3), (4, 1, 5)])
large_shapes = st.sampled_from([(PIECE_VALUES,), (PIECE_VALUES + 1,), (3, PIECE_VALUES // 2)])
weights = st.lists(st.one_of(st.integers(1, 100), st.integers(1, 10**9)), min_size=1, max_size=8)


def mean_of(folder, tensors, examples):
    """The weighted mean of one tensor a site, by way of files."""
    updates = []
    for k, (tensor, n_k) in enumerate(zip(tensors, examples, strict=True)):
        path = folder / f"{k}.safetensors"
        save_file({"w": tensor}, path)
        updates.append(Update(site=f"site-{k}", path=path, examples=n_k))
    WeightedMean().aggregate(updates[0].path, updates, folder / "out")
    return load_file(folder / "out")["w"]


def ulps_apart(one, other):
    """Representable values between two tensors' values, at most."""
    kind = BITS[one.dtype]
    lowest = torch.iinfo(kind).min

    def order(tensor):  # the bits of floats, read as sign and magnitude, are in the order of their values
        bits = tensor.reshape(-1).view(kind)
        return torch.where(bits < 0, lowest - bits, bits).long()

    return max((order(one) - order(other)).abs().tolist(), default=0)


def reference(tensors, examples):
    """Σ nₖ·wₖ / Σ nₖ in numpy's float64, rounded once to the type of the tensors."""
    total = np.zeros(tensors[0].shape)
    for tensor, n_k in zip(tensors, examples, strict=True):
        total = total + n_k * tensor.double().numpy()
    return torch.from_numpy(np.asarray(total / sum(examples))).to(tensors[0].dtype)


def tensors_of(shape, dtype, count, seed, magnitude):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, *shape, generator=generator, dtype=torch.float64) * magnitude
    return list(values.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype))


@given(small_shapes, dtypes, weights, st.integers(0, 1 << 32), st.sampled_from([1e-30, 1e-6, 1.0, 1e4, 1e38]))
@settings(max_examples=150)
def test_it_is_numpys_float64_mean_to_one_ulp(tmp_path_factory, shape, dtype, examples, seed, magnitude):
    tensors = tensors_of(shape, dtype, len(examples), seed, magnitude)
    mean = mean_of(tmp_path_factory.mktemp("mean"), tensors, examples)
    assert mean.shape == shape
    assert mean.dtype == dtype
    assert ulps_apart(mean, reference(tensors, examples)) <= 1


@given(large_shapes, dtypes, weights, st.integers(0, 1 << 32))
@settings(max_examples=12)
def test_it_is_numpys_float64_mean_over_the_ends_of_pieces(tmp_path_factory, shape, dtype, examples, seed):
    tensors = tensors_of(shape, dtype, len(examples), seed, 1.0)
    mean = mean_of(tmp_path_factory.mktemp("mean"), tensors, examples)
    assert ulps_apart(mean, reference(tensors, examples)) <= 1


@given(
    st.integers(1, 8).flatmap(
        lambda sites: st.tuples(
            st.lists(
                st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=sites, max_size=sites
            ),
            st.lists(st.integers(1, 10**9), min_size=sites, max_size=sites),
        )
    )
)
@settings(max_examples=100)
def test_any_fp32_values_average_to_one_ulp(tmp_path_factory, case):
    values, examples = case
    tensors = [torch.tensor([value], dtype=torch.float32) for value in values]
    mean = mean_of(tmp_path_factory.mktemp("mean"), tensors, examples)
    assert ulps_apart(mean, reference(tensors, examples)) <= 1


def test_a_small_mean_by_hand(tmp_path):
    tensors = [torch.tensor([1.0, -4.0, 0.0]), torch.tensor([5.0, 4.0, 1.0])]
    assert mean_of(tmp_path, tensors, [1, 3]).tolist() == [4.0, 2.0, 0.75]


def test_sums_are_not_taken_in_fp32(tmp_path):
    tensors = [torch.tensor([value]) for value in (2.0**25, 1.0, 1.0, -(2.0**25))]
    assert mean_of(tmp_path, tensors, [1, 1, 1, 1]).tolist() == [0.5]  # fp32 sums lose both ones: 0


@pytest.mark.parametrize("dtype", list(BITS))
def test_the_largest_values_do_not_overflow(tmp_path, dtype):
    largest = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
    assert torch.equal(mean_of(tmp_path, [largest, largest], [10**9, 10**9 - 1]), largest)


@pytest.mark.parametrize(
    ("values", "rounded"),
    [
        pytest.param((1.0, 1.0078125), 1.0, id="tie-to-even-below"),  # neighbours: 1 and 1 + 2**-7
        pytest.param((1.0078125, 1.015625), 1.015625, id="tie-to-even-above"),
        pytest.param((-1.0, -1.0078125), -1.0, id="tie-below-zero"),
    ],
)
def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even(tmp_path, values, rounded):
    tensors = [torch.tensor([value], dtype=torch.bfloat16) for value in values]
    assert mean_of(tmp_path, tensors, [1, 1]).tolist() == [rounded]


def test_a_site_with_more_examples_than_fp32_can_count_weighs_exactly(tmp_path):
    examples = [2**24 + 1, 2**24 - 1]
    mean = mean_of(tmp_path, [torch.tensor([1.0]), torch.tensor([0.0])], examples)
    assert mean.item() == np.float32(examples[0] / sum(examples))
    assert math.isclose(mean.item(), 0.5, rel_tol=1e-6)


def test_the_coordinator_does_not_pay_for_torch():
    modules = "sys, fedloom_server.aggregation, fedloom_server.aggregation.validation"
    code = f"import {modules}; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
