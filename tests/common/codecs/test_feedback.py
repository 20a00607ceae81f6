import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedloom_common.codecs.feedback import Feedback
from fedloom_common.errors import BadTensor, WrongState

PIECE = 1 << 16
CHAINS = [["topk"], ["topk", "int8", "zstd"], ["int4"], ["int8", "zstd"], ["bf16"]]


def models(round_, size=PIECE + 700):
    random = np.random.default_rng(round_)
    base = {"w": torch.tensor(random.standard_normal(size), dtype=torch.float32), "n": torch.tensor(round_)}
    change = torch.tensor(random.standard_normal(size) * 1e-2, dtype=torch.float32)
    return base, base | {"w": base["w"] + change}


def delta(base, trained):
    return (trained["w"] - base["w"]).numpy()


@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
def test_what_is_left_out_arrives_later(exchange, tmp_path, chain):
    """All that was told plus what is still kept is all that there was to tell."""
    wanted, told = np.zeros(PIECE + 700), np.zeros(PIECE + 700)
    for round_ in range(5):
        base, trained = models(round_)
        feedback = Feedback(tmp_path, f"run-{round_}")
        session = exchange(chain, base, trained).encode(feedback)
        feedback.commit()
        wanted += delta(base, trained)
        told += session.changes()["w"]
    kept = load_file(tmp_path / "kept.safetensors")["w"].double().numpy()
    assert np.abs(wanted - told).max() > 1e-5  # something is left out, or this would show nothing
    np.testing.assert_allclose(told + kept, wanted, atol=1e-7)


def test_feedback_tells_what_top_k_alone_would_lose(exchange, tmp_path):
    """With a small steady change beside a large one, plain top-k would never tell the small one."""
    base = {"w": torch.zeros(10)}
    trained = {"w": torch.tensor([1.0] + [0.4] * 9)}
    told = {True: np.zeros(10), False: np.zeros(10)}
    for round_ in range(30):
        feedback = Feedback(tmp_path, str(round_))
        told[False] += exchange([{"name": "topk", "fraction": 0.1}], base, trained).encode().changes()["w"]
        told[True] += (
            exchange([{"name": "topk", "fraction": 0.1}], base, trained).encode(feedback).changes()["w"]
        )
        feedback.commit()
    assert told[False].tolist() == [30.0] + [0.0] * 9
    assert told[True].min() > 5


def test_encoding_again_before_delivery_applies_nothing_twice(exchange, tmp_path):
    first, second = models(1), models(2)
    feedback = Feedback(tmp_path, "one")
    exchange(["topk"], *first).encode(feedback)
    feedback.commit()
    retried = Feedback(tmp_path, "two")
    once = exchange(["topk"], *second).encode(retried).encoded.read_bytes()
    assert exchange(["topk"], *second).encode(retried).encoded.read_bytes() == once
    retried.commit()
    retried.commit()
    assert exchange(["topk"], *second).encode(Feedback(tmp_path, "three")).encoded.read_bytes() != once


@pytest.mark.parametrize("chain", ["fp32", "zstd"])
def test_an_exact_codec_leaves_nothing_out(exchange, tmp_path, chain):
    feedback = Feedback(tmp_path, "one")
    exchange(chain, *models(1)).encode(feedback)
    feedback.commit()
    assert not any(tensor.any() for tensor in load_file(tmp_path / "kept.safetensors").values())


def test_an_update_that_is_given_up_leaves_no_trace(exchange, tmp_path):
    lost = Feedback(tmp_path, "lost")
    exchange(["topk"], *models(1)).encode(lost)
    lost.leavings.discard("lost")
    assert list(tmp_path.iterdir()) == []
    later = Feedback(tmp_path, "later")
    with_folder = exchange(["topk"], *models(2)).encode(later).encoded.read_bytes()
    assert (
        with_folder
        == exchange(["topk"], *models(2)).encode(Feedback(tmp_path / "new", "x")).encoded.read_bytes()
    )


def test_an_update_that_fails_to_encode_leaves_the_pending_residual_as_it_was(exchange, tmp_path):
    waiting = Feedback(tmp_path, "waiting")
    exchange(["topk"], *models(1)).encode(waiting)
    before = (tmp_path / "pending.safetensors").read_bytes()
    base, trained = models(2)
    trained["w"][PIECE + 3] = torch.nan
    with pytest.raises(BadTensor):
        exchange(["topk"], base, trained).encode(Feedback(tmp_path, "bad"))
    assert (tmp_path / "pending.safetensors").read_bytes() == before
    waiting.commit()


def test_only_the_update_that_was_prepared_can_be_committed(exchange, tmp_path):
    exchange(["topk"], *models(1)).encode(Feedback(tmp_path, "one"))
    with pytest.raises(WrongState, match="nothing is prepared for update other"):
        Feedback(tmp_path, "other").commit()
    Feedback(tmp_path, "other").leavings.discard("other")
    Feedback(tmp_path, "one").commit()


def test_a_crash_between_delivery_and_commit_is_made_good_after_the_restart(exchange, tmp_path):
    exchange(["topk"], *models(1)).encode(Feedback(tmp_path / "site", "one"))
    shutil.copytree(tmp_path / "site", tmp_path / "restarted")
    Feedback(tmp_path / "site", "one").commit()
    Feedback(tmp_path / "restarted", "one").commit()
    left = [
        {path.name: path.read_bytes() for path in (tmp_path / end).iterdir()} for end in ("site", "restarted")
    ]
    assert left[0] == left[1]
    assert list(left[0]) == ["kept.safetensors"]


def test_the_residual_is_durable_before_the_update_can_be_delivered(exchange, tmp_path, monkeypatch):
    order = []
    real = type(tmp_path).replace
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda self, target: (order.append(target.name), real(self, target))[1]
    )
    exchange(["topk"], *models(1)).encode(Feedback(tmp_path, "one"))
    assert order == ["pending.safetensors", "encoded.safetensors"]


def test_another_models_residual_is_refused(exchange, tmp_path):
    feedback = Feedback(tmp_path, "one")
    exchange(["topk"], *models(1)).encode(feedback)
    feedback.commit()
    with pytest.raises(BadTensor, match=r"another model's or codec's: tensor w has shape .* remove it"):
        exchange(["topk"], *models(2, size=40)).encode(Feedback(tmp_path, "two"))
