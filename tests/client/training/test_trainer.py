"""One rank, in this process, against plain torch and transformers."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DistributedSampler
from transformers import AutoConfig, AutoModelForCausalLM

from fedloom_client.training.orders import Cancelled, Order, WorkerResult
from fedloom_client.training.tasks import Inputs
from fedloom_client.training.tasks.causal import CausalLM
from fedloom_common.errors import BadTensor, TrainingFailed
from fedloom_common.tensors import write_tensors

MakeOrder = Callable[..., Order]


def blocks_of(directory: Path, name: str) -> np.ndarray:
    (folder,) = (directory / "data").iterdir()
    tokens = np.fromfile(folder / name / "input_ids.bin", np.uint16).astype(np.int64)
    return tokens[: len(tokens) // 32 * 32].reshape(-1, 32)


def reference_model(assets: Path, weights: Path) -> Any:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(assets))
    model.load_state_dict(load_file(weights), strict=False)
    model.tie_weights()
    return model


def assert_same_tensors(one: Path, other: Path, tolerance: float) -> None:
    first, second = load_file(one), load_file(other)
    assert list(first) == list(second)
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_training_is_the_plain_torch_loop_with_warmup_cosine_and_clipping(
    alone: Any, make_order: MakeOrder, assets: Path, global_model: Path, tmp_path: Path
) -> None:
    local = {
        "steps": 5,
        "batch_examples": 8,
        "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup_steps": 3, "final_ratio": 0.2},
        "clip_norm": 0.5,
    }
    result = alone.perform(make_order(local=local))

    blocks = blocks_of(alone.directory, "train")
    model = reference_model(assets, global_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    sampler: Any = DistributedSampler(range(len(blocks)), num_replicas=1, rank=0, seed=3, drop_last=True)  # type: ignore[arg-type]
    order, losses = list(sampler), []
    for step in range(5):
        rate = (step + 1) / 4 if step < 3 else 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 3) / 47)) / 2
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        examples = torch.from_numpy(blocks[order[step * 8 : step * 8 + 8]])
        loss = model(input_ids=examples, labels=examples).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    write_tensors(tmp_path / "reference.safetensors", dict(model.named_parameters()))

    assert_same_tensors(tmp_path / "update-1.safetensors", tmp_path / "reference.safetensors", 1e-5)
    assert result.metrics == {"loss": pytest.approx(sum(losses) / 5, rel=1e-5)}
    assert (result.examples, result.tokens) == (40, 40 * 31)


def test_accumulation_changes_nothing_but_memory(
    alone: Any, make_order: MakeOrder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    loss = CausalLM.loss

    def noted(self: CausalLM, model: Any, inputs: Inputs) -> torch.Tensor:
        at_once.append(len(inputs["input_ids"]))
        return loss(self, model, inputs)

    monkeypatch.setattr(CausalLM, "loss", noted)
    local = {"steps": 3, "optimizer": {"name": "sgd", "lr": 0.1}, "keep_optimizer_state": False}
    alone.perform(make_order(local=local, update_path=str(tmp_path / "whole")))
    alone.perform(make_order(local=local | {"accumulation_steps": 4}, update_path=str(tmp_path / "parts")))
    assert at_once == [8] * 3 + [2] * 12
    assert_same_tensors(tmp_path / "whole", tmp_path / "parts", 1e-6)


def test_evaluation_is_the_mean_loss_over_every_held_out_token(
    alone: Any, make_order: MakeOrder, assets: Path, global_model: Path
) -> None:
    result = alone.perform(make_order("evaluate", 0))
    blocks = torch.from_numpy(blocks_of(alone.directory, "held_out"))
    with torch.no_grad():
        expected = reference_model(assets, global_model)(input_ids=blocks, labels=blocks).loss.item()
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert (result.examples, result.tokens) == (len(blocks), len(blocks) * 31)
    assert result.update_path is None


def test_an_evaluation_honours_its_most_examples(alone: Any, make_order: MakeOrder) -> None:
    assert alone.perform(make_order("evaluate", 0, spec={"evaluation": {"max_examples": 5}})).examples == 5


def test_a_training_that_measures_first_tells_what_an_evaluation_would_and_trains_the_same(
    alone: Any, make_order: MakeOrder, tmp_path: Path
) -> None:
    plain = alone.perform(make_order())
    trained = (tmp_path / "update-1.safetensors").read_bytes()
    assert plain.before is None
    alone.restart()
    measuring = alone.perform(make_order(measures=True))
    assert (tmp_path / "update-1.safetensors").read_bytes() == trained
    assert (measuring.metrics, measuring.examples) == (plain.metrics, plain.examples)
    assert set(measuring.phase_seconds) >= {"train", "evaluate"}
    evaluated = alone.perform(make_order("evaluate", 0))
    assert (measuring.before.metrics, measuring.before.examples, measuring.before.tokens) == (
        evaluated.metrics, evaluated.examples, evaluated.tokens,
    )  # fmt: skip
    assert measuring.data_examples == len(blocks_of(alone.directory, "train"))
    assert evaluated.data_examples == 0


@pytest.mark.parametrize(("algorithm", "keeps"), [("plain", True), ("fedprox", True), ("plain", False)])
def test_training_alone_is_a_federation_of_one_in_one_go(
    alone: Any, make_order: MakeOrder, tmp_path: Path, algorithm: str, keeps: bool
) -> None:
    spec = {"rounds": 3, "evaluation": {"every_rounds": 2}}
    plain = {
        "steps": 3, "batch_examples": 8, "optimizer": {"lr": 1e-3}, "keep_optimizer_state": keeps,
    }  # fmt: skip
    model, seen = make_order().model_path, {}
    for round_ in (1, 2, 3):
        order = make_order(round_=round_, local=plain, spec=spec, model_path=str(model))
        alone.perform(order)
        model = tmp_path / f"update-{round_}.safetensors"
        evaluated = alone.perform(
            make_order("evaluate", round_, local=plain, spec=spec, model_path=str(model))
        )
        seen[round_] = evaluated.metrics["loss"]
    alone.restart()
    local = plain | {"algorithm": algorithm}
    result = alone.perform(make_order("alone", 3, local=local, spec=spec, alone_rounds=3, measures=True))
    assert seen[3] < seen[2]
    assert result.metrics["loss"] == pytest.approx(seen[3], rel=1e-6)
    assert result.update_path is None
    initial = alone.perform(make_order("evaluate", 0, local=local, spec=spec))
    assert result.before.metrics == initial.metrics


def test_a_site_that_only_measures_measures_on_all_its_data(alone: Any, make_order: MakeOrder) -> None:
    part = alone.perform(make_order("evaluate", 0)).examples
    alone.source = alone.source.model_copy(update={"held_out": 1.0})
    alone.restart()
    result = alone.perform(make_order("evaluate", 0))
    # 6,000 bytes and an end token after each of two texts, in blocks of 32
    assert result.examples == 6002 // 32 > 5 * part


def test_a_site_without_held_out_examples_trains_all_the_same(alone: Any, make_order: MakeOrder) -> None:
    alone.source = alone.source.model_copy(update={"held_out": 1e-6})
    alone.restart()
    result = alone.perform(make_order(measures=True))
    assert result.before is None
    assert result.examples == 32


def test_an_evaluation_between_rounds_changes_no_bit_of_the_training(
    alone: Any, make_order: MakeOrder, assets: Path, tmp_path: Path
) -> None:
    dropping = Path(shutil.copytree(assets, tmp_path / "dropping"))
    config = json.loads((dropping / "config.json").read_text())
    (dropping / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.3}))

    def updates(name: str, *, evaluate: bool) -> list[bytes]:
        alone.directory = tmp_path / name
        alone.restart()
        for round_ in (1, 2):
            if evaluate:
                alone.perform(make_order("evaluate", round_, assets_dir=str(dropping)))
            alone.perform(make_order("train", round_, assets_dir=str(dropping)))
        return [(tmp_path / f"update-{round_}.safetensors").read_bytes() for round_ in (1, 2)]

    assert updates("plain", evaluate=False) == updates("measured", evaluate=True)


def train_rounds(alone: Any, make_order: MakeOrder, rounds: list[int], **keywords: Any) -> list[WorkerResult]:
    return [alone.perform(make_order("train", round_, **keywords)) for round_ in rounds]


def test_a_restart_between_rounds_goes_on_from_the_kept_optimizer_state(
    alone: Any, make_order: MakeOrder, tmp_path: Path
) -> None:
    train_rounds(alone, make_order, [1, 2, 3])
    unbroken = (tmp_path / "update-3.safetensors").read_bytes()
    alone.directory = tmp_path / "broken"
    for round_ in (1, 2, 3):
        alone.restart()
        train_rounds(alone, make_order, [round_])
    assert (tmp_path / "update-3.safetensors").read_bytes() == unbroken


def test_a_round_tried_again_begins_from_the_state_before_it(
    alone: Any, make_order: MakeOrder, tmp_path: Path
) -> None:
    train_rounds(alone, make_order, [1, 2])
    first = (tmp_path / "update-2.safetensors").read_bytes()
    train_rounds(alone, make_order, [2])
    assert (tmp_path / "update-2.safetensors").read_bytes() == first
    alone.restart()
    train_rounds(alone, make_order, [2])
    assert (tmp_path / "update-2.safetensors").read_bytes() == first


def test_kept_state_matters_and_reset_state_does_not_outlive_its_round(
    alone: Any, make_order: MakeOrder, tmp_path: Path
) -> None:
    def second_round(name: str, rounds: list[int], *, keep: bool) -> bytes:
        alone.directory = tmp_path / name
        alone.restart()
        train_rounds(alone, make_order, rounds, local={"keep_optimizer_state": keep})
        return (tmp_path / "update-2.safetensors").read_bytes()

    assert second_round("a", [1, 2], keep=False) == second_round("b", [2], keep=False)
    assert second_round("c", [1, 2], keep=True) != second_round("d", [2], keep=True)


def test_a_cancelled_round_leaves_no_trace_in_the_next(
    alone: Any, make_order: MakeOrder, tmp_path: Path
) -> None:
    train_rounds(alone, make_order, [1])
    alone.stop_wanted = True
    with pytest.raises(Cancelled):
        alone.perform(make_order("train", 2))
    alone.stop_wanted = False
    assert not (tmp_path / "update-2.safetensors").exists()
    train_rounds(alone, make_order, [2])
    after_cancel = (tmp_path / "update-2.safetensors").read_bytes()
    alone.directory = tmp_path / "undisturbed"
    alone.restart()
    train_rounds(alone, make_order, [1, 2])
    assert (tmp_path / "update-2.safetensors").read_bytes() == after_cancel


def test_a_loss_that_is_not_finite_names_the_step(
    alone: Any, make_order: MakeOrder, tmp_path: Path, global_model: Path
) -> None:
    broken = load_file(global_model)
    broken["transformer.ln_f.weight"][0] = math.nan
    write_tensors(tmp_path / "nan.safetensors", broken)
    with pytest.raises(TrainingFailed, match="the loss is nan at step 1 of 4"):
        alone.perform(make_order(model_path=str(tmp_path / "nan.safetensors")))
    assert not (tmp_path / "update-1.safetensors").exists()


def test_a_last_step_that_spoils_the_weights_fails_and_leaves_no_trace_in_the_next_round(
    alone: Any, make_order: MakeOrder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(parameters: Any, norm: float) -> None:
        clip(parameters := list(parameters), norm)
        steps.append(norm)
        if len(steps) == 4:
            parameters[-1].grad[0] = math.nan

    train_rounds(alone, make_order, [1])
    steps: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_
    with monkeypatch.context() as patch, pytest.raises(TrainingFailed, match="not finite after step 4 of 4"):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
        alone.perform(make_order("train", 2))
    assert not (tmp_path / "update-2.safetensors").exists()
    train_rounds(alone, make_order, [3])
    after_failure = (tmp_path / "update-3.safetensors").read_bytes()
    alone.directory = tmp_path / "undisturbed"
    alone.restart()
    train_rounds(alone, make_order, [1, 3])
    assert (tmp_path / "update-3.safetensors").read_bytes() == after_failure


def test_one_epoch_is_as_many_steps_as_cover_the_examples(alone: Any, make_order: MakeOrder) -> None:
    result = alone.perform(make_order(local={"steps": None, "epochs": 1}))
    examples = len(blocks_of(alone.directory, "train"))
    assert result.examples == math.ceil(examples / 8) * 8


def test_a_bf16_model_stays_bf16(alone: Any, make_order: MakeOrder, assets: Path, tmp_path: Path) -> None:
    from fedloom_common.tensors import Manifest

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(assets), dtype=torch.bfloat16)
    write_tensors(tmp_path / "bf16.safetensors", dict(model.named_parameters()))
    alone.perform(make_order(model_path=str(tmp_path / "bf16.safetensors")))
    given, update = (
        Manifest.read(tmp_path / "bf16.safetensors"),
        Manifest.read(tmp_path / "update-1.safetensors"),
    )
    given.require_same_tensors(update)
    assert {info.dtype for info in update.tensors} == {"BF16"}


def test_bf16_autocast_trains_close_to_fp32(alone: Any, make_order: MakeOrder) -> None:
    full = alone.perform(make_order(local={"precision": "fp32"})).metrics["loss"]
    half = alone.perform(make_order(local={"precision": "bf16"})).metrics["loss"]
    assert half != full
    assert half == pytest.approx(full, rel=0.01)


def without_positions(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["transformer.wpe.weight"]


def with_turned_positions(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer.wpe.weight"] = torch.ones(32, 64)


def with_something_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["more"] = torch.ones(2)


def with_both_names_of_the_tied_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_positions, r"wpe\.weight of the model is not in"),
        (with_turned_positions, r"wpe\.weight has shape \[32, 64\].*\[64, 32\]"),
        (with_something_more, "more of the global model is not in"),
        (with_both_names_of_the_tied_weight, r"lm_head\.weight is in the global model twice"),
    ],
)
def test_a_global_model_that_is_not_the_configs_is_refused(
    alone: Any,
    make_order: MakeOrder,
    global_model: Path,
    tmp_path: Path,
    change: Callable[[Any], Any],
    message: str,
) -> None:
    tensors = load_file(global_model)
    change(tensors)
    write_tensors(tmp_path / "other.safetensors", tensors)
    with pytest.raises(BadTensor, match=message):
        alone.perform(make_order(model_path=str(tmp_path / "other.safetensors")))


AUTO_MAP = {"auto_map": {"AutoConfig": "evil.Config"}}


@pytest.mark.parametrize(
    ("file", "extra", "message"),
    [
        ("config.json", AUTO_MAP, r"config\.json has an auto_map"),
        ("tokenizer_config.json", AUTO_MAP, r"tokenizer_config\.json has an auto_map"),
        ("config.json", {"model_type": "t5"}, "no AutoModelForCausalLM of model_type t5"),
        ("config.json", {"model_type": "nonesuch"}, r"config\.json does not load"),
        ("tokenizer_config.json", {"eos_token": None}, "has no end-of-text token"),
    ],
)
def test_unfit_assets_are_refused(
    alone: Any,
    make_order: MakeOrder,
    assets: Path,
    tmp_path: Path,
    file: str,
    extra: dict[str, Any],
    message: str,
) -> None:
    unfit = Path(shutil.copytree(assets, tmp_path / "unfit"))
    (unfit / file).write_text(json.dumps(json.loads((unfit / file).read_text()) | extra))
    with pytest.raises((TrainingFailed, BadTensor), match=message):
        alone.perform(make_order(assets_dir=str(unfit)))


def test_examples_longer_than_the_model_reads_are_refused(alone: Any, make_order: MakeOrder) -> None:
    with pytest.raises(TrainingFailed, match="the task reads 128 tokens at once, but the model at most 64"):
        alone.perform(make_order(spec={"task": {"context_tokens": 128}}))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    alone: Any, make_order: MakeOrder, assets: Path, tmp_path: Path
) -> None:
    unfit = Path(shutil.copytree(assets, tmp_path / "unfit"))
    config = json.loads((unfit / "config.json").read_text()) | {"vocab_size": 100}
    (unfit / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(unfit))
    write_tensors(tmp_path / "small.safetensors", dict(model.named_parameters()))
    with pytest.raises(TrainingFailed, match="makes token 256, but the model has only 100"):
        alone.perform(make_order(assets_dir=str(unfit), model_path=str(tmp_path / "small.safetensors")))


def test_a_full_disk_is_reported_as_such(
    alone: Any, make_order: MakeOrder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "update.safetensors")

    monkeypatch.setattr("fedloom_client.training.models.write_tensors", full)
    with pytest.raises(TrainingFailed, match=r"cannot write what it trained.*No space left"):
        alone.perform(make_order())


def test_held_out_texts_that_are_too_short_say_what_to_do(alone: Any, make_order: MakeOrder) -> None:
    alone.source = alone.source.model_copy(update={"held_out": 0.001})
    assert alone.perform(make_order()).examples == 32
    with pytest.raises(TrainingFailed, match="too small for one example: add some"):
        alone.perform(make_order("evaluate"))


def test_progress_goes_from_preparing_to_the_last_step(alone: Any, make_order: MakeOrder) -> None:
    alone.perform(make_order())
    phases = [progress.phase for progress in alone.progress]
    assert phases == sorted(phases)
    last = alone.progress[-1]
    assert (last.phase, last.done, last.total) == ("train", 4, 4)
    assert last.loss is not None
    assert last.tokens_per_s is not None
    assert last.tokens_per_s > 0
