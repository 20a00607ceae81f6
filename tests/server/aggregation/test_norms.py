"""How far updates move their models, and scaling them by it, against numpy on whole vectors."""

import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import decode_model
from fedloom_common.codecs.encoder import encode_model
from fedloom_common.codecs.spec import AS_IS, Codecs
from fedloom_common.digests import digest_of_file
from fedloom_common.runspec import Aggregation
from fedloom_common.tensorfiles import TensorFile
from fedloom_server.aggregation import BaseModel, Update, aggregator_for
from fedloom_server.aggregation.norms import change_norm, clip_factor, longest_change
from fedloom_server.aggregation.pieces import PIECE_VALUES

SHAPES = {"w": (PIECE_VALUES + 5,), "scalar": (), "empty": (0, 2), "half": (30,)}


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return tensors | {"half": tensors["half"].bfloat16(), "steps": torch.tensor([seed])}


def saved(path, tensors):
    save_file(tensors, path)
    return path


def flat(tensors):
    return np.concatenate([tensors[name].double().numpy().reshape(-1) for name in SHAPES])


def test_the_norm_is_that_of_the_change_of_all_float_tensors(tmp_path):
    base, trained = drawn(0), drawn(1)
    update = Update(site="a", path=saved(tmp_path / "a", trained), examples=3)
    came = change_norm(update, saved(tmp_path / "base", base), AS_IS, "")
    assert came == pytest.approx(np.linalg.norm(flat(trained) - flat(base)), rel=1e-12)


def test_the_norm_of_a_stale_update_is_that_of_its_own_change_unscaled(tmp_path):
    old, trained = drawn(0), drawn(1)
    update = Update(
        site="a", path=saved(tmp_path / "a", trained), examples=3, factor=0.25, clip=0.1,
        base=BaseModel(path=saved(tmp_path / "old", old), digest=""),
    )  # fmt: skip
    came = change_norm(update, saved(tmp_path / "present", drawn(2)), AS_IS, "")
    assert came == pytest.approx(np.linalg.norm(flat(trained) - flat(old)), rel=1e-12)


@pytest.mark.parametrize("chain", ["int8", ["topk", "int8", "zstd"], "zstd"], ids=str)
def test_an_encoded_update_is_measured_and_clipped_as_what_it_decodes_to(tmp_path, chain):
    stages, base = TypeAdapter(Codecs).validate_python(chain), saved(tmp_path / "base", drawn(0))
    digest, path, decoded = digest_of_file(base), tmp_path / "encoded", tmp_path / "decoded"
    with TensorFile(saved(tmp_path / "trained", drawn(1))) as model, TensorFile(base) as before:
        encode_model(Chain(stages), trained=model, base=before, base_digest=digest, out=path)
        decode_model(path, Chain(stages), base=before, base_digest=digest, out=decoded)
    update = Update(site="a", path=path, examples=3, clip=0.25)
    wanted = flat(load_file(decoded)) - flat(drawn(0))
    norm = change_norm(update, base, stages, digest)
    assert norm == pytest.approx(np.linalg.norm(wanted), rel=1e-3 if "topk" in chain else 1e-6)
    aggregator_for(Aggregation(), stages, digest).aggregate(base, [update], tmp_path / "out")
    came = load_file(tmp_path / "out")
    np.testing.assert_allclose(
        came["w"].numpy(), (flat(drawn(0)) + wanted / 4)[: PIECE_VALUES + 5], rtol=1e-6, atol=1e-6
    )


def test_clipping_scales_the_change_alone_and_no_control_variate(tmp_path):
    base = saved(tmp_path / "base", {"w": torch.tensor([10.0]), "control/w": torch.tensor([1.0])})
    path = saved(tmp_path / "a", {"w": torch.tensor([14.0]), "control/w": torch.tensor([9.0])})
    update = Update(site="a", path=path, examples=1, clip=0.5)
    assert change_norm(update, base, AS_IS, "") == 4
    aggregator_for(Aggregation()).aggregate(base, [update], tmp_path / "out")
    came = load_file(tmp_path / "out")
    assert (came["w"].item(), came["control/w"].item()) == (12.0, 9.0)


def test_the_bound_is_a_multiple_of_the_median_of_what_moved():
    assert longest_change([1.0, 0.0, 100.0, 3.0], 2.0) == 6.0
    assert longest_change([1.0, 3.0], 1.0) == 2.0
    assert longest_change([0.0], 1.0) == math.inf
    assert [clip_factor(norm, 2.0) for norm in (0.0, 1.0, 2.0, 8.0)] == [1.0, 1.0, 1.0, 0.25]
