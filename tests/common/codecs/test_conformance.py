"""What every chain of codecs must hold to."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedloom_common.codecs import encoder
from fedloom_common.errors import BadTensor
from fedloom_common.tensors import ITEM_BYTES, Manifest

DENSE = [
    "fp32",
    "bf16",
    "fp16",
    "int8",
    "int4",
    {"name": "int8", "block": 16},
    {"name": "int4", "block": 4096},
]
SPARSE = [
    ["topk"],
    [{"name": "topk", "fraction": 0.3}, "int8"],
    [{"name": "topk", "fraction": 1.0}, "int4"],
    ["topk", "bf16"],
    [{"name": "topk", "fraction": 1e-6}, "fp16"],
]
PLAIN = [chain if isinstance(chain, list) else [chain] for chain in DENSE + SPARSE]
CHAINS = [*PLAIN, ["zstd"], *([*chain, "zstd"] for chain in PLAIN)]

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PIECE = 1 << 16
CODE_LIMITS = {"fp16": 65520.0, "bf16": (2 - 2**-8) * 2.0**127}  # from there on values round to infinity
fast = settings(
    max_examples=6,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def title(chain):
    return "+".join(
        stage if isinstance(stage, str) else "-".join(map(str, stage.values())) for stage in chain
    )


@pytest.fixture(params=CHAINS, ids=title)
def chain(request):
    return request.param


@st.composite
def models(draw, large=True):
    """A base model and one trained from it: adapters, biases, buffers, perhaps a tensor of some pieces."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    shapes = [(64,), (3, 5), (16, 129), (1, 1, 2)]
    if large and draw(st.sampled_from([True, False, False])):
        shapes.append(draw(st.sampled_from([(PIECE + 1,), (7, 20_000)])))
    base, trained = {}, {}
    for place, shape in enumerate(shapes):
        name, dtype = f"h.{place}.lora_A.weight", draw(st.sampled_from(FLOATS))
        scale = draw(st.sampled_from([0.0, 1e-42, 1e-7, 1e-3, 1.0, 100.0]))
        change = random.standard_normal(shape) * scale
        change *= random.random(shape, np.float32) < draw(st.sampled_from([0.1, 1]))
        start = random.standard_normal(shape, np.float32) * 0.02
        base[name], trained[name] = torch.tensor(start).to(dtype), torch.tensor(start + change).to(dtype)
    carried = {
        "scalar": torch.tensor(random.standard_normal()),
        "empty": torch.zeros(0, 3),
        "double": torch.tensor(random.standard_normal(5)),
        "steps": torch.tensor([7, 2**60]),
        "mask": torch.tensor([True, False]),
    }
    return base | {name: torch.zeros_like(tensor) for name, tensor in carried.items()}, trained | carried


def change_of(base, trained, name):
    """By definition: the difference in fp32."""
    return (trained[name].float() - base[name].float()).flatten().numpy()


def half_steps(values, levels, block):
    """Half of each value's step, by hand: the largest magnitude of its block, over the levels."""
    padded = np.abs(np.pad(values.astype(np.float64), (0, -len(values) % block))).reshape(-1, block)
    return np.repeat(padded.max(axis=1) / levels / 2, block)[: len(values)]


def bound(stages, values):
    """The error that the documents promise for each value, and what fp32 arithmetic adds to it."""
    for stage in stages:
        name, block = (stage, None) if isinstance(stage, str) else (stage["name"], stage.get("block"))
        if name == "bf16":
            return np.abs(values) * 2.0**-8 + 2.0**-134
        if name == "fp16":
            return np.abs(values) * 2.0**-11 + 2.0**-25
        if name in ("int8", "int4"):
            levels, usual = {"int8": (127, 256), "int4": (7, 64)}[name]
            return half_steps(values, levels, block or usual) * (1 + 2.0**-14) + 2.0**-126
    return np.zeros(len(values))


def largest(values, stages):
    """Indices that top-k keeps, by sorting: of equal magnitudes the first; all without top-k."""
    if stages[0] != "topk" and not (isinstance(stages[0], dict) and stages[0]["name"] == "topk"):
        return np.arange(len(values))
    fraction = 0.01 if stages[0] == "topk" else stages[0]["fraction"]
    keep = max(1, math.ceil(fraction * len(values)))
    return np.sort(np.argsort(-np.abs(values), kind="stable")[:keep])


@fast
@given(models())
def test_the_error_stays_within_the_bound(exchange, chain, model):
    base, trained = model
    decoded = exchange(chain, base, trained).encode()
    for name, came in decoded.changes().items():
        wanted = change_of(base, trained, name)
        kept = largest(wanted, chain)
        assert np.all(np.abs(came[kept].astype(np.float64) - wanted[kept]) <= bound(chain, wanted[kept]))
        assert not np.delete(came, kept).any()


@fast
@given(models())
def test_a_decoded_model_is_the_base_plus_the_change_in_fp32_rounded_to_its_type(exchange, chain, model):
    base, trained = model
    session = exchange(chain, base, trained).encode()
    changes, decoded, values = session.changes(), session.decode(), session.values(np.float64)
    for name in changes:
        fp32 = base[name].float().flatten() + torch.from_numpy(changes[name])
        assert np.array_equal(values[name], fp32.numpy().astype(np.float64))
        assert decoded[name].shape == base[name].shape
        assert decoded[name].dtype == base[name].dtype
        assert torch.equal(decoded[name].flatten(), fp32.to(base[name].dtype))
    for name in set(base) - set(changes):  # of an exact chain, and what none touches
        assert decoded[name].dtype == trained[name].dtype
        assert torch.equal(decoded[name], trained[name])
    wanted, came = Manifest.read(session.base), Manifest.read(session.folder / "decoded.safetensors")
    assert [info.name for info in came.tensors] == [info.name for info in wanted.tensors]
    assert came.metadata == wanted.metadata


@fast
@given(models())
def test_pieces_may_be_read_in_any_order(exchange, chain, model):
    session = exchange(chain, *model).encode()
    forwards, backwards = session.values(), session.pieces_backwards()
    assert all(np.array_equal(forwards[name], backwards[name]) for name in forwards)


@fast
@given(models())
def test_the_same_models_give_the_same_file_and_it_tells_its_codec_and_base(exchange, chain, model):
    session = exchange(chain, *model).encode()
    session.check()
    content = session.encoded.read_bytes()
    assert len(content) <= session.limit_bytes()
    with safe_open(session.encoded, "pt") as file:
        metadata = file.metadata()
    library = load_file(session.encoded)
    for name in ("scalar", "empty", "double", "steps", "mask"):
        assert torch.equal(library[name], model[1][name])
    for info in Manifest.read(session.encoded).tensors:  # or others could not map the file
        assert info.start_bytes % ITEM_BYTES[info.dtype] == 0
    assert "fedloom.codec" in metadata
    assert ("fedloom.base" in metadata) == (chain != ["fp32"])
    assert exchange(chain, *model).encode().encoded.read_bytes() == content


@fast
@given(models(large=False), st.data())
def test_a_value_that_is_not_finite_is_refused_with_its_tensor_and_index(exchange, chain, model, data):
    base, trained = model
    name = data.draw(
        st.sampled_from([name for name in base if base[name].is_floating_point() and base[name].numel()])
    )
    place = data.draw(st.integers(0, base[name].numel() - 1))
    value = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    trained = trained | {name: trained[name].clone()}
    trained[name].view(-1)[place] = value
    session = exchange(chain, base, trained)
    session.encoded.unlink(missing_ok=True)
    index = [int(part) for part in np.unravel_index(place, base[name].shape)]
    with pytest.raises(BadTensor) as refusal:
        session.encode()
    assert f"tensor {name}: holds {value} at index {index}" in str(refusal.value)
    assert not session.encoded.exists()


@settings(fast, max_examples=15)
@given(st.data())
def test_no_damage_to_a_file_gets_past_the_checks(exchange, chain, data):
    base = {"w": torch.linspace(-1, 1, 300).reshape(3, 100), "half": torch.ones(40, dtype=torch.float16)}
    session = exchange(chain, base, {name: tensor * 1.5 for name, tensor in base.items()}).encode()
    content = bytearray(session.encoded.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(header, len(content) - 1) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.sampled_from([0x00, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    session.encoded.write_bytes(content)
    try:
        session.check()
    except BadTensor:
        return
    decoded = session.decode()
    assert all(
        tensor.isfinite().all() and tensor.shape == base[name].shape for name, tensor in decoded.items()
    )


@settings(fast, max_examples=15)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
@example([3.4028234663852886e38, -3.3e38])  # the largest: a scale that is rounded up would make it infinite
@example([1e-45, -1e-45, 0.0])
def test_any_finite_changes_are_coded_within_the_bound_or_refused(exchange, chain, values):
    trained = {"w": torch.tensor(values)}
    session = exchange(chain, {"w": torch.zeros(len(values))}, trained)
    if max(map(abs, values)) >= min(CODE_LIMITS.get(str(stage), math.inf) for stage in chain):
        with pytest.raises(BadTensor, match=r"w: the change at .* is .*, beyond B?F16's range"):
            session.encode()
        return
    session.encode().check()
    kept = largest(trained["w"].numpy(), chain)
    wanted, came = trained["w"].numpy()[kept], session.values()["w"][kept]
    assert np.all(np.abs(came.astype(np.float64) - wanted) <= bound(chain, wanted))


def test_memory_does_not_grow_with_the_model(exchange, chain, monkeypatch):
    monkeypatch.setattr(encoder, "HELD_VALUES", 0)  # top-k may hold tensors of so many values; of none here
    peaks = []
    for pieces in (2, 16):
        base = {"w": torch.zeros(pieces * PIECE)}
        session = exchange(chain, base, {"w": torch.linspace(-1, 1, pieces * PIECE)})
        tracemalloc.start()
        session.encode()
        session.check()
        session.decode_file(session.base, session.folder / "decoded.safetensors")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 8 << 20
    assert peaks[1] - peaks[0] < 1 << 20


def test_what_top_k_holds_in_memory_and_what_it_reads_anew_are_the_same(exchange, monkeypatch):
    random = np.random.default_rng(0)
    base = {"w": torch.zeros(3 * PIECE + 5)}
    trained = {"w": torch.tensor(random.integers(-9, 9, 3 * PIECE + 5) / 8, dtype=torch.float32)}  # many ties
    held = exchange(["topk"], base, trained).encode().encoded.read_bytes()
    monkeypatch.setattr(encoder, "HELD_VALUES", 0)
    assert exchange(["topk"], base, trained).encode().encoded.read_bytes() == held


def test_the_models_must_have_the_same_tensors(exchange, chain):
    with pytest.raises(BadTensor, match=r"w has shape \[3\], wanted \[4\]"):
        exchange(chain, {"w": torch.zeros(4)}, {"w": torch.zeros(3)}).encode()


def test_both_ends_of_a_downlink_hold_the_same_bytes_after_50_rounds(exchange, chain, tmp_path):
    """The coordinator codes the next model against the one that sites hold, so that no error is ever lost."""
    random = np.random.default_rng(1)
    truth = {"w": torch.zeros(50, 7), "b": torch.zeros(9, dtype=torch.bfloat16), "n": torch.tensor(0)}
    ends = [tmp_path / "coordinator", tmp_path / "site"]
    for end in ends:
        save_file(truth, end, {"format": "pt"})
    for _ in range(50):
        step = torch.tensor(random.standard_normal((50, 7)) * 0.1, dtype=torch.float32)
        truth = {"w": truth["w"] + step, "b": truth["b"] + 0.5, "n": truth["n"] + 1}
        before = load_file(ends[0])
        session = exchange(chain, before, truth).encode()
        for end in ends:
            session.decode_file(end, end)
        assert ends[0].read_bytes() == ends[1].read_bytes()
        wanted = change_of(before, truth, "w")
        kept, held = largest(wanted, chain), load_file(ends[0])
        off = held["w"].double().flatten().numpy() - truth["w"].double().flatten().numpy()
        assert np.all(np.abs(off[kept]) <= bound(chain, wanted[kept]) + 2.0**-20)  # of one round, not of 50
        assert held["n"] == truth["n"]
