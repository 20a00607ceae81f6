"""How records become examples, what bad ones are told, and what the metrics are: by hand."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom_client.training.tasks import IGNORED, BadRecord, label_metrics, label_sums, new_task
from fedloom_client.training.tasks.seq2seq import rouge_l
from fedloom_client.training.tasks.tokenizers import bytes_of_tokens
from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec import Classification
from fedloom_common.scores import macro_f1

TINY_GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 200}
CLASSES = {"kind": "classification", "labels": ["neg", "neu", "pos"], "context_tokens": 8}
PAIRS = {"kind": "seq2seq", "source_tokens": 10, "target_tokens": 8, "prefix": "up: "}
CHAT = {"kind": "instruction", "context_tokens": 64}
END = 256  # of the tokenizer of bytes


def values_of(run: Any, record: Mapping[str, Any]) -> Any:
    return new_task(run.spec.task, run.assets).example(record).values


@pytest.mark.parametrize(("label", "number"), [("neu", 1), (2, 2)])
def test_a_label_is_a_name_or_its_number(new_run: Callable[..., Any], label: object, number: int) -> None:
    run = new_run("bert", CLASSES)
    values = values_of(run, {"text": "good", "label": label})
    assert values == {"input_ids": list(b"good"), "labels": [number]}


def test_numerals_in_order_from_0_are_names_and_numbers_alike(new_run: Callable[..., Any]) -> None:
    run = new_run("bert", CLASSES | {"labels": ["0", "1", "2"]})
    assert [values_of(run, {"text": "x", "label": label})["labels"] for label in (2, "2")] == [[2], [2]]


@pytest.mark.parametrize("label", [1, 3])
def test_a_number_that_is_another_labels_name_is_refused(new_run: Callable[..., Any], label: int) -> None:
    run = new_run("bert", CLASSES | {"labels": ["1", "2", "3"]})
    assert values_of(run, {"text": "x", "label": "1"})["labels"] == [0]
    with pytest.raises(BadRecord, match=r"numerals in another order .*as text.*\nthe label is"):
        values_of(run, {"text": "x", "label": label})


def test_a_target_ends_with_the_end_token_and_a_source_begins_with_the_prefix(
    new_run: Callable[..., Any],
) -> None:
    values = values_of(new_run("t5", PAIRS), {"source": "sea", "target": "SEA"})
    assert values == {"input_ids": list(b"up: sea"), "labels": [*b"SEA", END]}


def test_the_decoder_reads_the_target_one_token_later(new_run: Callable[..., Any]) -> None:
    run = new_run("t5", PAIRS)
    pad = AutoTokenizer.from_pretrained(run.assets).pad_token_id
    labels = np.array([[65, 66, END], [67, END, IGNORED]])
    batch = new_task(run.spec.task, run.assets).batch({"labels": labels}, iter(()))
    assert batch["decoder_input_ids"].tolist() == [[pad, 65, 66], [pad, 67, END]]


def answers_of(run: Any, record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The whole text of a conversation, and its parts on which the loss is taken."""
    tokenizer, values = AutoTokenizer.from_pretrained(run.assets), values_of(run, record)
    parts, part = [], []
    for label in [*values["labels"], IGNORED]:
        if label != IGNORED:
            part.append(label)
        elif part:
            parts.append(tokenizer.decode(part))
            part = []
    return tokenizer.decode(values["input_ids"]), parts


def test_only_the_answer_is_learnt(new_run: Callable[..., Any]) -> None:
    text, answers = answers_of(new_run("gpt2", CHAT), {"prompt": "Hi", "response": "Hello"})
    assert text == "### user\nHi\n\n### assistant\nHello<|endoftext|>"
    assert answers == ["Hello<|endoftext|>"]


def test_every_answer_of_a_conversation_is_learnt(new_run: Callable[..., Any]) -> None:
    run = new_run("gpt2", CHAT | {"context_tokens": 200}, model={"config": TINY_GPT2})
    messages = [
        {"role": "system", "content": "Be brief"}, {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "d"}, {"role": "user", "content": "e?"},
    ]  # fmt: skip
    _, answers = answers_of(run, {"messages": messages})
    assert answers == ["b<|endoftext|>", "d<|endoftext|>"]


def test_the_tokenizers_own_chat_template_is_used(new_run: Callable[..., Any]) -> None:
    run = new_run("gpt2", CHAT)
    tokenizer = AutoTokenizer.from_pretrained(run.assets)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(run.assets)
    assert answers_of(run, {"prompt": "Hi", "response": "Yo"}) == ("<user>Hi</><assistant>Yo</>", ["Yo</>"])


def test_long_records_are_cut_and_counted_and_those_without_an_answer_left_out(
    new_run: Callable[..., Any],
) -> None:
    run = new_run("gpt2", CHAT, local={"steps": 1, "batch_examples": 2})
    long_answer, long_prompt = ({"prompt": "a", "response": "b" * 99}, {"prompt": "a" * 99, "response": "b"})
    site = run.site("a", [{"prompt": "a", "response": "b"}] * 20 + [long_answer] * 3 + [long_prompt] * 2)
    result = site.evaluate()
    assert result.metrics["shortened_share"] == pytest.approx((3 + 2) / 25)
    assert result.weights["shortened_share"] == 25
    (folder,) = (site.folder / "packed").iterdir()
    made = sum((folder / part / "labels.ends").stat().st_size // 8 for part in ("train", "held_out"))
    assert made == 23


@pytest.mark.parametrize(
    ("family", "task", "record", "message"),
    [
        ("bert", CLASSES, {"text": "x", "label": "bad"}, "record 2 .*its label is none of neg, neu, pos"),
        ("bert", CLASSES, {"text": "x", "label": 3}, r"nor a number from 0 to 2: .*\nthe label is 3"),
        ("bert", CLASSES, {"text": None, "label": 1}, "record 2 .*its text is NoneType, wanted text"),
        ("t5", PAIRS, {"source": "x", "target": 7}, "its target is int, wanted text"),
        ("gpt2", CHAT, {"body": "x"}, "it has body; wanted prompt and response, or messages"),
        ("gpt2", CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "its messages are no list of"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named_with_what_was_wanted(
    new_run: Callable[..., Any], family: str, task: dict[str, Any], record: dict[str, Any], message: str
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good = {"text": "a", "label": 0, "source": "a", "target": "b", "messages": turns, "body": "a"}
    first = {name: good[name] for name in record}
    with pytest.raises(TrainingFailed, match=message) as caught:
        new_run(family, task).site("a", [first, record]).train()
    told, *_ = str(caught.value).splitlines()
    assert not [value for value in record.values() if isinstance(value, str) and repr(value) in told]


def test_a_missing_field_an_empty_file_and_plain_texts_say_what_to_do(
    new_run: Callable[..., Any],
) -> None:
    run = new_run("bert", CLASSES)
    with pytest.raises(TrainingFailed, match="have no field label: they have mood, text; name the one"):
        run.site("a", [{"text": "x", "mood": "neg"}]).train()
    with pytest.raises(TrainingFailed, match="make no example: there are none"):
        run.site("b", []).train()
    with pytest.raises(TrainingFailed, match=r"needs records with the fields text and label, and .*is text"):
        run.site("c", [{"text": "x", "label": 1}], format="text").train()


def test_fields_may_have_other_names_at_a_site(new_run: Callable[..., Any]) -> None:
    run = new_run("bert", CLASSES)
    data = [{"body": "good", "mood": "pos"}] * 10
    site = run.site("a", data, fields={"text": "body", "label": "mood"})
    assert site.evaluate().counts["actual"] == [0, 0, 2]


def test_a_model_with_other_labels_than_the_tasks_is_refused(new_run: Callable[..., Any]) -> None:
    run = new_run("bert", CLASSES)
    with pytest.raises(TrainingFailed, match="the task has 2 labels, the model's config has 3"):
        new_task(Classification(labels=("a", "b")), run.assets)


def test_macro_f1_by_hand() -> None:
    # actual 0 0 0 1 1 2, predicted 0 0 1 1 2 2: F1 of 4/5, 2/4, 2/3; a label that nobody has is left out
    assert macro_f1([2, 1, 1, 0], [2, 2, 2, 0], [3, 2, 1, 0]) == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)
    assert macro_f1([0, 0], [0, 0], [0, 0]) == 0


@pytest.mark.parametrize(
    ("came", "wanted", "score"),
    [
        # two examples of Lin 2004, section 3.1: 3 and 2 of 4 words are in the longest common subsequence
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("Der Bär schläft.", "der bär schläft", 1),
        ("солнце встаёт", "солнце садится", 1 / 2),
        ("का", "की", 0),  # one consonant, and other vowels
        ("हिन्दी भाषा", "हिन्दी भाषी", 1 / 2),
        ("snake_case's 2nd", "Snake case S 2ND", 1),  # as rouge-score takes what is no letter and no digit
        ("", "word", 0),
        ("\u2764\ufe0f", "\u2600\ufe0f", 0),  # a heart and a sun, each with the mark that gives it colours
    ],
)
def test_rouge_l_by_hand(came: str, wanted: str, score: float) -> None:
    assert rouge_l(came, wanted) == pytest.approx(score)


def test_labels_are_counted_by_hand_also_where_the_model_has_more_outputs_than_names() -> None:
    logits = torch.eye(4)[[0, 0, 1, 3, 2]].mul(50)  # predicts 0, 0, 1, 3, and 2 where nothing is asked
    sums = label_sums(logits, torch.tensor([0, 1, 1, 3, IGNORED]))
    assert {name: sums[name].tolist() for name in ("hits", "predicted", "actual")} == {
        "hits": [1, 1, 0, 1], "predicted": [2, 1, 0, 1], "actual": [1, 2, 0, 1],
    }  # fmt: skip
    assert sums["loss"].item() == pytest.approx(50.0)  # of the one that is wrong
    measured = label_metrics({name: value.reshape(-1).tolist() for name, value in sums.items()}, 4)
    assert measured.metrics["loss"] == pytest.approx(12.5)
    assert measured.metrics["accuracy"] == 0.75


def test_held_out_texts_of_special_tokens_alone_are_not_measured(new_run: Callable[..., Any]) -> None:
    task = {"kind": "masked_lm", "context_tokens": 8}
    site = new_run("bert", task).site("a", [{"text": "<|endoftext|>" * 12}] * 12)
    with pytest.raises(TrainingFailed, match="held-out examples none has anything to predict: add some"):
        site.evaluate()
    order = site.order("train", update_path=str(site.folder / "update"))
    assert site.perform(replace(order, measures=True)).before is None


def with_padding(run: Any, *, config: int | None = None, new_token: str | None = None) -> Any:
    """The run with another token to fill batches up with, in the model's config or the tokenizer."""
    if config is not None:
        file = run.assets / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": config}))
    if new_token is not None:
        tokenizer = AutoTokenizer.from_pretrained(run.assets)
        tokenizer.add_special_tokens({"pad_token": new_token})
        tokenizer.save_pretrained(run.assets)
    return run


def test_a_model_without_a_limit_of_positions_reads_texts_of_any_length(new_run: Callable[..., Any]) -> None:
    xlnet = {"model_type": "xlnet", "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}
    run = new_run("bert", CLASSES, model={"config": xlnet}, local={"steps": 1})
    assert json.loads((run.assets / "config.json").read_text()).get("max_position_embeddings", -1) == -1
    texts = [{"text": "a" * length, "label": length % 3} for length in range(1, 20)]
    assert run.site("a", texts).train().metrics["loss"] > 0


def of_tokenizer(run: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """The run with another tokenizer.json."""
    file = run.assets / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content["model"])
    file.write_text(json.dumps(content))
    return run


def test_a_tokenizer_for_a_newer_library_is_told(new_run: Callable[..., Any]) -> None:
    run = of_tokenizer(new_run("gpt2", CHAT), lambda model: model.update(type="Newer"))
    with pytest.raises(TrainingFailed, match="tokenizer does not load: data did not match"):
        run.site("a", PROMPTS).train()


def test_tokens_numbers_may_have_gaps(new_run: Callable[..., Any]) -> None:
    model = {"config": TINY_GPT2 | {"vocab_size": 70_001}}
    run = new_run("gpt2", {"kind": "causal_lm", "context_tokens": 8}, model=model, local={"steps": 1})
    site = of_tokenizer(run, lambda model: model["vocab"].update(h=70_000)).site(
        "a", [{"text": "hh" * 9}] * 20
    )
    assert site.train().metrics["loss"] > 0
    [packed] = (site.folder / "packed").glob("*/train/input_ids.bin")
    assert np.fromfile(packed, np.int32)[:2].tolist() == [70_000, 70_000]


PROMPTS = [{"prompt": "a" * length, "response": "b"} for length in range(1, 20)]


def test_a_padding_token_of_minus_1_is_none(new_run: Callable[..., Any]) -> None:
    run = with_padding(new_run("llama", CHAT, local={"steps": 1}), config=-1)
    assert new_task(run.spec.task, run.assets).padding["input_ids"] == END
    assert run.site("a", PROMPTS).train().metrics["loss"] > 0


def test_a_padding_token_that_the_model_does_not_know_is_told(new_run: Callable[..., Any]) -> None:
    run = with_padding(new_run("gpt2", CHAT), new_token="<new>")
    with pytest.raises(TrainingFailed, match="makes token 257, but the model has only 257 tokens"):
        run.site("a", PROMPTS).train()


def test_exact_match_and_rouge_are_of_what_the_model_writes(
    new_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run("t5", PAIRS | {"generate_examples": 4, "target_tokens": 16})
    site = run.site("a", [{"source": "sun", "target": "the sea"}] * 40)

    def write(self: Any, **_: Any) -> torch.Tensor:
        """As four examples come in one batch: right, half right, wrong, right with padding."""
        texts = [b"the sea", b"the sun", b"moon", b"the sea"]
        rows = [[self.config.decoder_start_token_id, *text, END] for text in texts]
        return torch.tensor([row + [self.config.pad_token_id] * (12 - len(row)) for row in rows])

    monkeypatch.setattr("transformers.T5ForConditionalGeneration.generate", write)
    result = site.evaluate()
    assert result.metrics["exact_match"] == 2 / 4
    assert result.metrics["rouge_l"] == pytest.approx((1 + 1 / 2 + 0 + 1) / 4)
    assert (result.weights["exact_match"], result.weights["loss"]) == (4, 8 * 8)


def test_bits_per_byte_is_the_loss_in_bits_over_the_bytes_it_stands_for(new_run: Callable[..., Any]) -> None:
    run = new_run("gpt2", {"kind": "causal_lm", "context_tokens": 16})
    text = "ä" * 40  # two bytes each, of which the tokenizer makes two tokens
    result = run.site("a", [{"text": text}] * 10).evaluate()
    blocks = torch.tensor(([*text.encode(), END] * 2)[: 2 * 81 // 16 * 16]).reshape(-1, 16)
    model = AutoModelForCausalLM.from_pretrained(run.assets)
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    size = int((blocks[:, 1:] != END).sum())
    assert result.weights == {"bits_per_byte": size}
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    bits = loss * blocks[:, 1:].numel() / math.log(2)
    assert result.metrics["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)


def test_tokens_of_sentencepiece_stand_for_the_bytes_that_they_write() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "▁the": 1, "ä": 2, "<0xC3>": 3, "</s>": 4, "▁": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    assert bytes_of_tokens(fast) == [0, 4, 2, 1, 0, 1]


def test_a_word_in_several_tokens_of_wordpiece_stands_for_its_own_bytes() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2, "##ä": 3, "#": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    sizes = bytes_of_tokens(fast)
    assert sum(sizes[token] for token in fast("playing")["input_ids"]) == len("playing")
    assert sizes == [0, 4, 3, 2, 1]


def test_an_added_token_stands_for_its_own_bytes(new_run: Callable[..., Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(new_run("gpt2", CHAT).assets)
    tokenizer.add_tokens(["日本", "<0x41>"])
    first, second = tokenizer.convert_tokens_to_ids(["日本", "<0x41>"])
    assert tokenizer("日本")["input_ids"] == [first]
    sizes = bytes_of_tokens(tokenizer)
    assert (sizes[first], sizes[second], sizes[END]) == (6, 6, 0)
    assert sizes[:END] == [1] * 256


def test_one_token_of_each_block_is_a_target_however_small_the_share(new_run: Callable[..., Any]) -> None:
    run = new_run("bert", {"kind": "masked_lm", "context_tokens": 8, "masked_share": 1e-9})
    tokens = np.full((100, 6), END)
    tokens[:90, 2:4] = 7
    batch = new_task(run.spec.task, run.assets).batch(
        {"input_ids": tokens}, (np.random.default_rng([1, row]) for row in range(100))
    )
    is_target = batch["labels"] != IGNORED
    assert is_target.sum(axis=1).tolist() == [1] * 90 + [0] * 10
    assert (batch["labels"][is_target] == 7).all()
    assert 20 < is_target[:, 3].sum() < 70  # now one, now the other


def test_masks_hide_8_in_10_targets_replace_1_and_leave_1(new_run: Callable[..., Any]) -> None:
    run = new_run("bert", {"kind": "masked_lm", "context_tokens": 64, "masked_share": 0.2})
    task = new_task(run.spec.task, run.assets)
    tokens = np.random.default_rng(0).integers(0, 256, (500, 64))
    tokens[:, 10] = END
    batch = task.batch({"input_ids": tokens}, (np.random.default_rng([1, row]) for row in range(500)))
    inputs, labels = batch["input_ids"], batch["labels"]
    is_target = labels != IGNORED
    mask = AutoTokenizer.from_pretrained(run.assets).mask_token_id
    assert not is_target[:, 10].any()
    assert (labels[is_target] == tokens[is_target]).all()
    assert (inputs[~is_target] == tokens[~is_target]).all()
    assert is_target.mean() == pytest.approx(0.2 * 63 / 64, abs=0.01)
    hidden, kept = inputs[is_target] == mask, inputs[is_target] == tokens[is_target]
    assert hidden.mean() == pytest.approx(0.8, abs=0.02)
    assert kept.mean() == pytest.approx(0.1, abs=0.015)
