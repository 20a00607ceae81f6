"""Updates that are encoded, each by every chain: their mean, folding them in steps, and checking them."""

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import decode_model
from fedloom_common.codecs.encoder import encode_model
from fedloom_common.codecs.spec import Codecs
from fedloom_common.digests import digest_of_file
from fedloom_common.errors import BadTensor
from fedloom_common.tensorfiles import TensorFile
from fedloom_server.aggregation import Update
from fedloom_server.aggregation.mean import WeightedMean
from fedloom_server.aggregation.validation import validate_update

CHAINS = ["bf16", "fp16", "int8", "int4", "topk", "zstd", ["bf16", "zstd"], ["topk", "int8", "zstd"]]
EXAMPLES = (3, 10, 1)


def stages_of(chain):
    return TypeAdapter(Codecs).validate_python(chain)


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(700, 300, generator=generator).to(dtype),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 4),
        "steps": torch.tensor([seed]),
    }


class Encoded:
    """A base model and updates of it, encoded, with what they decode to."""

    def __init__(self, folder, chain, dtype=torch.float32):
        self.stages, self.base = stages_of(chain), folder / "base"
        start = tensors(0, dtype)
        save_file(start, self.base, {"format": "pt"})
        self.digest = digest_of_file(self.base)
        self.updates, self.models = [], []
        for number, examples in enumerate(EXAMPLES):
            trained, out, decoded = (
                folder / f"{kind}-{number}" for kind in ("trained", "encoded", "decoded")
            )
            change = tensors(number + 1, dtype)
            save_file(
                {n: t + change[n] / 9 if t.is_floating_point() else t for n, t in start.items()}, trained
            )
            with TensorFile(trained) as model, TensorFile(self.base) as before:
                encode_model(Chain(self.stages), trained=model, base=before, base_digest=self.digest, out=out)
                decode_model(out, Chain(self.stages), base=before, base_digest=self.digest, out=decoded)
            self.updates.append(Update(site=f"site-{number}", path=out, examples=examples))
            self.models.append(load_file(decoded))

    def mean(self, name):
        """Σ nₖ·θₖ / n in numpy's float64, of the decoded models."""
        total = sum(n * model[name].double().numpy() for n, model in zip(EXAMPLES, self.models, strict=True))
        return total / sum(EXAMPLES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_the_mean_of_encoded_updates_is_that_of_the_models_that_they_decode_to(tmp_path, chain, dtype):
    encoded = Encoded(tmp_path, chain, dtype)
    WeightedMean(encoded.stages, encoded.digest).aggregate(encoded.base, encoded.updates, tmp_path / "out")
    came = load_file(tmp_path / "out")
    assert came["w"].dtype == dtype
    rounding = {torch.float32: 4e-7, torch.bfloat16: 1e-2}[
        dtype
    ]  # decoding rounds each model to its type once
    np.testing.assert_allclose(came["w"].double().numpy(), encoded.mean("w"), rtol=rounding, atol=rounding)
    np.testing.assert_allclose(came["scalar"].numpy(), encoded.mean("scalar"), rtol=1e-6)
    assert came["steps"].tolist() == [0]
    assert came["empty"].shape == (0, 4)


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_encoded_updates_folded_before_give_the_same_bytes(tmp_path, chain):
    encoded = Encoded(tmp_path, chain)
    rule = WeightedMean(encoded.stages, encoded.digest)
    rule.aggregate(encoded.base, encoded.updates, tmp_path / "at-once")
    rule.fold(encoded.base, encoded.updates[:1], tmp_path / "one")
    rule.fold(encoded.base, encoded.updates[1:2], tmp_path / "two", earlier=tmp_path / "one")
    rule.aggregate(encoded.base, encoded.updates[2:], tmp_path / "in-steps", earlier=tmp_path / "two")
    assert (tmp_path / "in-steps").read_bytes() == (tmp_path / "at-once").read_bytes()


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_an_encoded_update_passes_the_check_and_a_spoilt_one_does_not(tmp_path, chain):
    encoded = Encoded(tmp_path, chain)
    path = encoded.updates[0].path
    validate_update(path, encoded.base, encoded.stages, encoded.digest)
    with pytest.raises(BadTensor, match="base model is"):
        validate_update(path, encoded.base, encoded.stages, "blake3:" + "0" * 64)
    with pytest.raises(BadTensor):
        validate_update(encoded.base, encoded.base, encoded.stages, encoded.digest)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadTensor, match="header describes"):
        validate_update(path, encoded.base, encoded.stages, encoded.digest)


def test_an_update_of_another_codec_names_its_site(tmp_path):
    encoded = Encoded(tmp_path, "int8")
    with pytest.raises(
        BadTensor, match=r"the update of site site-0: the file's codec is .*int8.*, wanted .*int4"
    ):
        WeightedMean(stages_of("int4"), encoded.digest).aggregate(
            encoded.base, encoded.updates, tmp_path / "out"
        )
