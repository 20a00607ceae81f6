"""Every family of models learns its tasks, and by the loss that transformers itself takes."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoTokenizer

WORDS = ["the", "sun", "moon", "sea", "wind", "rises", "falls", "over", "under", "green", "hill", "sleeps"]
LABELS = ["low", "high"]
TASKS: dict[str, dict[str, Any]] = {
    "causal_lm": {"kind": "causal_lm", "context_tokens": 32},
    "masked_lm": {"kind": "masked_lm", "context_tokens": 32},
    "classification": {"kind": "classification", "context_tokens": 32, "labels": LABELS},
    "seq2seq": {"kind": "seq2seq", "source_tokens": 24, "target_tokens": 12},
    "instruction": {"kind": "instruction", "context_tokens": 64},
}


def records(kind: str, number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records of several lengths that have something to learn."""
    generator = random.Random(seed)
    made = []
    for _ in range(number):
        word, half = generator.choice(WORDS), generator.randrange(2)
        some = generator.choices(WORDS[6 * half : 6 * half + 6], k=generator.randrange(1, 5))
        made.append({
            "causal_lm": {"text": " ".join(generator.choices(WORDS, k=8))},
            "masked_lm": {"text": " ".join(generator.choices(WORDS, k=8))},
            "classification": {"text": " ".join(some), "label": LABELS[half]},
            "seq2seq": {"source": f"{word} {word}", "target": word},
            "instruction": {"prompt": f"say {word}", "response": word},
        }[kind])  # fmt: skip
    return made


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("gpt2", "causal_lm"), ("gpt2", "instruction"), ("gpt2", "classification"),
        ("llama", "causal_lm"), ("llama", "instruction"), ("llama", "classification"),
        ("bert", "masked_lm"), ("bert", "classification"),
        ("t5", "seq2seq"),
    ],
)  # fmt: skip
def test_a_family_learns_a_task(new_run: Callable[..., Any], family: str, kind: str) -> None:
    run = new_run(family, TASKS[kind])
    site = run.site("a", records(kind, 100))
    before = site.evaluate()
    trained = site.train()
    after = site.evaluate(Path(trained.update_path))
    assert after.metrics["loss"] < 0.75 * before.metrics["loss"]
    assert (trained.examples, after.examples) == (160, before.examples)
    auto = getattr(transformers, run.spec.task.model_class)
    assert auto.from_pretrained(run.assets).config.model_type == family


def arrays_of(site: Any) -> list[Mapping[str, np.ndarray]]:
    """The site's packed training examples, one by one, read as the files are documented."""
    (folder,) = (site.folder / "packed").iterdir()
    columns = {}
    for file in (folder / "train").glob("*.ends"):
        ends = np.fromfile(file, np.int64)
        columns[file.stem] = np.split(np.fromfile(file.with_suffix(".bin"), np.int32), ends[:-1])
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def padded(parts: list[np.ndarray], filler: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(part.astype(np.int64)) for part in parts], batch_first=True, padding_value=filler
    )


def own_loss(run: Any, examples: list[Mapping[str, np.ndarray]]) -> tuple[Any, torch.Tensor]:
    """The model of a run, and the mean loss over examples that transformers takes itself."""
    model = getattr(transformers, run.spec.task.model_class).from_pretrained(run.assets).train()
    lengths = [len(example["input_ids"]) for example in examples]
    mask = padded([np.ones(length) for length in lengths], 0)
    labels = padded([example["labels"] for example in examples], -100)
    if run.spec.task.kind == "classification":
        labels = labels[:, 0]
    filler = AutoTokenizer.from_pretrained(run.assets).eos_token_id
    inputs = padded([example["input_ids"] for example in examples], model.config.pad_token_id or filler)
    return model, model(input_ids=inputs, attention_mask=mask, labels=labels).loss


RATE = 0.5
ONE_STEP = {
    "steps": 1, "optimizer": {"name": "sgd", "lr": RATE}, "clip_norm": None,
    "schedule": {"kind": "constant"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gpt2", "instruction"), ("gpt2", "classification"), ("bert", "classification"), ("t5", "seq2seq")],
)
def test_one_step_of_several_sites_is_one_step_on_their_pooled_data(
    new_run: Callable[..., Any], family: str, kind: str
) -> None:
    run = new_run(family, TASKS[kind], local=ONE_STEP | {"batch_examples": 8})
    sites = [run.site(name, records(kind, 10, seed=seed)) for seed, name in enumerate("abc")]
    results = [site.train() for site in sites]
    weights = [getattr(result, run.spec.task.weighs) for result in results]
    updates = [load_file(result.update_path) for result in results]
    mean = {
        name: np.average([update[name].astype(np.float64) for update in updates], axis=0, weights=weights)
        for name in updates[0]
    }

    model, loss = own_loss(run, [example for site in sites for example in arrays_of(site)])
    loss.backward()
    stepped = {name: value - RATE * value.grad for name, value in model.named_parameters()}
    if kind != "classification":
        assert len({result.tokens for result in results}) > 1
    for name, value in mean.items():
        np.testing.assert_allclose(value, stepped[name].detach().numpy(), atol=1e-6, err_msg=name)


@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_the_loss_of_a_step_is_transformers_own_over_all_its_parts(
    new_run: Callable[..., Any], accumulation_steps: int
) -> None:
    local = ONE_STEP | {"batch_examples": 8, "accumulation_steps": accumulation_steps}
    run = new_run("t5", TASKS["seq2seq"], local=local)
    site = run.site("a", records("seq2seq", 10))
    result = site.train()
    _, loss = own_loss(run, arrays_of(site))
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert result.tokens == sum((example["labels"] != -100).sum() for example in arrays_of(site))


def test_masks_differ_from_step_to_step_and_are_the_same_however_a_step_is_cut(
    new_run: Callable[..., Any],
) -> None:
    def trained(accumulation_steps: int, steps: int) -> Any:
        local = ONE_STEP | {"steps": steps, "batch_examples": 8, "accumulation_steps": accumulation_steps}
        run = new_run("bert", TASKS["masked_lm"], local=local)
        return run.site("a", records("masked_lm", 10)).train()

    whole, cut, longer = trained(1, 1), trained(4, 1), trained(1, 2)
    assert whole.tokens == cut.tokens != longer.tokens / 2
    assert whole.metrics["loss"] == pytest.approx(cut.metrics["loss"], rel=1e-6)
    first, second = load_file(whole.update_path), load_file(cut.update_path)
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], atol=1e-6, err_msg=name)


def test_a_masked_model_is_measured_on_the_same_masks_every_time(new_run: Callable[..., Any]) -> None:
    run = new_run("bert", TASKS["masked_lm"])
    data = records("masked_lm", 60)
    assert run.site("a", data).evaluate().metrics == run.site("b", data).evaluate().metrics


class Killed(BaseException):
    """The process ends here."""


def test_a_masked_model_goes_on_from_a_checkpoint_as_if_nothing_had_been(
    new_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = {
        "steps": 5,
        "batch_examples": 4,
        "checkpoint_every": 2,
        "optimizer": {"name": "adamw", "lr": 0.01},
    }
    run, data = new_run("bert", TASKS["masked_lm"], local=local), records("masked_lm", 40)
    undisturbed = run.site("a", data).train()
    site, real, taken = run.site("b", data), torch.optim.Optimizer.zero_grad, []

    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        taken.append(1)
        if len(taken) == 4:
            raise Killed
        real(self, set_to_none)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.optim.Optimizer, "zero_grad", zero_grad)
        site.train()
    resumed = site.restarted().train()
    assert (resumed.tokens, resumed.metrics) == (undisturbed.tokens, undisturbed.metrics)
    updates = [Path(result.update_path).read_bytes() for result in (undisturbed, resumed)]
    assert updates[0] == updates[1]
