"""Updates that began from older models: their changes, scaled by staleness, join the present model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import decode_model
from fedloom_common.codecs.encoder import encode_model
from fedloom_common.codecs.spec import Codecs
from fedloom_common.digests import digest_of_file
from fedloom_common.errors import BadTensor
from fedloom_common.tensorfiles import TensorFile
from fedloom_server.aggregation import BaseModel, Update, staleness_factor
from fedloom_server.aggregation.mean import PIECE_VALUES, WeightedMean


def base_model(path):
    return BaseModel(path=path, digest=digest_of_file(path))


def saved(path, tensors):
    save_file(tensors, path, {"format": "pt"})
    return path


def reference(model, updates):
    """θ + Σ nₖ/n sₖ (θₖ − θ_bₖ)  in numpy's float64; ``updates`` are (θₖ, θ_bₖ, nₖ, sₖ)."""
    total = sum(examples for _, _, examples, _ in updates)
    step = sum(examples * factor * (trained - base) for trained, base, examples, factor in updates)
    return model + step / total


def test_a_small_case_by_hand(tmp_path):
    old = saved(tmp_path / "old", {"w": torch.tensor([0.0, 8.0])})
    model = saved(tmp_path / "model", {"w": torch.tensor([10.0, 10.0])})
    fresh = saved(tmp_path / "fresh", {"w": torch.tensor([14.0, 6.0])})  # changes +4, -4
    stale = saved(tmp_path / "stale", {"w": torch.tensor([8.0, 0.0])})  # changes +8, -8, of which half count
    updates = [
        Update(site="a", path=fresh, examples=1),
        Update(site="b", path=stale, examples=3, base=base_model(old), factor=0.5),
    ]
    WeightedMean().aggregate(model, updates, tmp_path / "out")
    assert load_file(tmp_path / "out")["w"].tolist() == [14.0, 6.0]  # 10 ± (1·4 + 3·½·8) / 4


def test_the_older_an_update_the_less_it_counts():
    assert [staleness_factor(versions, 0.5) for versions in (0, 3, 8)] == [1.0, 0.5, 1 / 3]
    assert staleness_factor(1000, 0.0) == 1.0
    assert staleness_factor(3, 2.0) == 1 / 16


def test_a_buffer_of_stale_updates_alone_makes_a_smaller_step(tmp_path):
    zero = saved(tmp_path / "zero", {"w": torch.zeros(3)})
    one = saved(tmp_path / "one", {"w": torch.ones(3)})
    updates = [Update(site="a", path=one, examples=7, base=base_model(zero), factor=0.25)]
    WeightedMean().aggregate(zero, updates, tmp_path / "out")
    assert load_file(tmp_path / "out")["w"].tolist() == [0.25] * 3


updates_drawn = st.lists(
    st.tuples(st.integers(1, 10**6), st.integers(0, 3), st.floats(0.01, 4.0)), min_size=1, max_size=6
)


@given(
    updates_drawn,
    st.sampled_from([(), (0,), (5,), (2, 3), (PIECE_VALUES + 3,)]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 1 << 32),
)
@settings(max_examples=60)
def test_it_is_numpys_float64_result(tmp_path_factory, drawn, shape, dtype, seed):
    folder = tmp_path_factory.mktemp("stale")
    generator = torch.Generator().manual_seed(seed)

    def drawn_tensor():
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    models = [drawn_tensor() for _ in range(4)]  # the last is the present one
    paths = [saved(folder / f"model-{age}", {"w": model}) for age, model in enumerate(models)]
    updates, terms = [], []
    for number, (examples, age, factor) in enumerate(drawn):
        trained = drawn_tensor()
        is_fresh = age == 3
        base = None if is_fresh else base_model(paths[age])
        path = saved(folder / f"update-{number}", {"w": trained})
        updates.append(
            Update(
                site=f"{number}", path=path, examples=examples, base=base, factor=1.0 if is_fresh else factor
            )
        )
        terms.append(
            (trained.double().numpy(), models[age].double().numpy(), examples, 1.0 if is_fresh else factor)
        )
    WeightedMean().aggregate(paths[3], updates, folder / "out")
    came = load_file(folder / "out")["w"]
    assert came.dtype == dtype
    wanted = reference(models[3].double().numpy(), terms)
    rounding = torch.finfo(dtype).eps
    largest = 8 + 16 * max(factor for *_, factor in terms)  # of normal values, and of changes times factor
    np.testing.assert_allclose(came.double().numpy(), wanted, rtol=rounding, atol=8 * largest * 2.0**-52)


CHAINS = ["fp32", "bf16", "int8", "zstd", ["topk", "int8", "zstd"]]


class Federation:
    """Two models and updates of both, encoded against the one that each began from."""

    def __init__(self, folder, chain):
        self.stages = TypeAdapter(Codecs).validate_python(chain)
        coder = Chain(self.stages)
        self.old = base_model(saved(folder / "old", _tensors(0)))
        self.model = base_model(saved(folder / "model", _tensors(1)))
        self.updates, self.terms = [], []
        for number, (base, examples, factor) in enumerate(
            [(self.model, 5, 1.0), (self.old, 2, 0.5), (self.old, 9, 0.5), (self.model, 4, 1.0)]
        ):
            trained = saved(folder / f"trained-{number}", _moved(load_file(base.path), number))
            path = trained
            if not coder.is_as_is:
                path = folder / f"encoded-{number}"
                with TensorFile(trained) as after, TensorFile(base.path) as before:
                    encode_model(coder, trained=after, base=before, base_digest=base.digest, out=path)
                    decode_model(path, coder, base=before, base_digest=base.digest, out=trained)
            self.updates.append(
                Update(
                    site=f"site-{number}", path=path, examples=examples,
                    base=None if base is self.model else base, factor=factor,
                )
            )  # fmt: skip
            self.terms.append((load_file(trained), load_file(base.path), examples, factor))
        self.rule = WeightedMean(self.stages, self.model.digest)

    def wanted(self, name):
        terms = [
            (trained[name].double().numpy(), base[name].double().numpy(), examples, factor)
            for trained, base, examples, factor in self.terms
        ]
        return reference(load_file(self.model.path)[name].double().numpy(), terms)


def _tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(700, 300, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "half": torch.randn(40, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 4),
        "steps": torch.tensor([seed]),
    }


def _moved(tensors, seed):
    change = _tensors(seed + 10)
    return {n: t + change[n] / 9 if t.is_floating_point() else t for n, t in tensors.items()}


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_an_encoded_update_is_decoded_against_its_own_base(tmp_path, chain):
    federation = Federation(tmp_path, chain)
    federation.rule.aggregate(federation.model.path, federation.updates, tmp_path / "out")
    came = load_file(tmp_path / "out")
    np.testing.assert_allclose(came["w"].numpy(), federation.wanted("w"), rtol=4e-7, atol=4e-7)
    np.testing.assert_allclose(came["scalar"].numpy(), federation.wanted("scalar"), rtol=1e-6)
    np.testing.assert_allclose(came["half"].float().numpy(), federation.wanted("half"), rtol=1e-2, atol=1e-2)
    assert came["steps"].tolist() == [1]  # the present model's
    assert came["empty"].shape == (0, 4)


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("groups", [[1, 1, 1, 1], [2, 2], [3]], ids=str)
def test_stale_updates_folded_before_give_the_same_bytes(tmp_path, chain, groups):
    federation = Federation(tmp_path, chain)
    federation.rule.aggregate(federation.model.path, federation.updates, tmp_path / "at-once")
    earlier, rest = None, list(federation.updates)
    for number, count in enumerate(groups):
        out = tmp_path / f"sum-{number}"
        federation.rule.fold(federation.model.path, rest[:count], out, earlier=earlier)
        earlier, rest = out, rest[count:]
    federation.rule.aggregate(federation.model.path, rest, tmp_path / "in-steps", earlier=earlier)
    assert (tmp_path / "in-steps").read_bytes() == (tmp_path / "at-once").read_bytes()


def test_an_update_encoded_against_another_base_than_it_names_is_refused(tmp_path):
    federation = Federation(tmp_path, "int8")
    astray = Update(site="x", path=federation.updates[1].path, examples=1, base=federation.model)
    with pytest.raises(BadTensor, match=r"site x: the file's base model is blake3:"):
        federation.rule.aggregate(federation.model.path, [astray], tmp_path / "out")


def test_a_change_that_leaves_the_range_is_told(tmp_path):
    zero = saved(tmp_path / "zero", {"w": torch.zeros(2)})
    huge = saved(tmp_path / "huge", {"w": torch.full((2,), math.inf)})
    with pytest.raises(BadTensor, match="tensor w is not finite"):
        WeightedMean().aggregate(
            zero,
            [Update(site="a", path=huge, examples=1, base=base_model(zero), factor=0.5)],
            tmp_path / "out",
        )
