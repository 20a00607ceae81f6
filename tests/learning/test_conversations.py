"""Which tokens of a conversation are learnt, with tokenizers that do not write it part by part."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedloom_client.training.tasks import IGNORED, BadRecord, new_task

CHAT = {"kind": "instruction", "context_tokens": 64}
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}"
    "{% else %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}


def with_tokenizer(run: Any, tokenizer: Any, template: str) -> Any:
    """The run with another tokenizer."""
    tokenizer.chat_template = template
    tokenizer.save_pretrained(run.assets)
    return run


def with_template(run: Any, template: str) -> Any:
    return with_tokenizer(run, AutoTokenizer.from_pretrained(run.assets), template)


def of_sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: a space before every text, written ▁."""
    words = ["▁", "▁Hi", "▁Yo", "▁Hey", "▁[INST]", "▁[/INST]", "Hi", "Yo"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁<s>": 3} | {word: 4 + n for n, word in enumerate(words)}
    letters = sorted({letter for word in words for letter in word} - vocabulary.keys())
    vocabulary |= {letter: len(vocabulary) + number for number, letter in enumerate(letters)}
    scores = [(word, -1.0 if len(word) > 1 else -9.0) for word in vocabulary]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def learnt(run: Any, record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The tokens of a record, and the runs of them on which the loss is taken."""
    values = new_task(run.spec.task, run.assets).example(record).values
    tokenizer = AutoTokenizer.from_pretrained(run.assets)
    parts: list[list[str]] = [[]]
    for token, label in zip(values["input_ids"], values["labels"], strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            parts[-1].append(tokenizer.convert_ids_to_tokens(token))
        elif parts[-1]:
            parts.append([])
    return tokenizer.convert_ids_to_tokens(values["input_ids"]), [part for part in parts if part]


def test_the_tokens_are_those_of_the_whole_conversation(new_run: Callable[..., Any]) -> None:
    run = with_tokenizer(new_run("gpt2", CHAT), of_sentencepiece(), LLAMA2)
    tokens, answers = learnt(run, {"messages": [USER, ANSWER, USER, ANSWER]})
    text = "<s>[INST] Hi [/INST] Yo </s>" * 2
    assert tokens == AutoTokenizer.from_pretrained(run.assets).tokenize(text)
    assert answers == [["▁Yo", "▁", "</s>"]] * 2


def test_an_answers_word_that_reaches_into_the_prompt_is_learnt(new_run: Callable[..., Any]) -> None:
    template = LLAMA2.replace("' [/INST]'", "' [/INST] '").replace("' ' + m.content", "m.content")
    run = with_tokenizer(new_run("gpt2", CHAT), of_sentencepiece(), template)
    _, answers = learnt(run, {"messages": [USER, ANSWER]})  # the space before it ends the prompt
    assert answers == [["▁Yo", "▁", "</s>"]]


def test_a_token_of_an_answers_end_and_the_next_turn_is_not_learnt(new_run: Callable[..., Any]) -> None:
    run = new_run("gpt2", CHAT)
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters | {"><": 256}, merges=[(">", "<")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    run = with_tokenizer(run, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="><"), MARKED)
    _, answers = learnt(run, {"messages": [USER, ANSWER, USER, ANSWER]})
    assert answers == [["Y", "o", "<", "/"], ["Y", "o", "<", "/", ">"]]


def test_a_first_turn_of_the_assistant_is_given_and_not_learnt(new_run: Callable[..., Any]) -> None:
    run = with_template(new_run("gpt2", CHAT), MARKED)
    greeting = {"role": "assistant", "content": "Hey"}
    tokens, answers = learnt(run, {"messages": [greeting, USER, ANSWER]})
    assert "".join(tokens) == "<assistant>Hey</><user>Hi</><assistant>Yo</>"
    assert ["".join(answer) for answer in answers] == ["Yo</>"]
    assert new_task(run.spec.task, run.assets).example({"messages": [greeting]}) is None
    assert new_task(run.spec.task, run.assets).example({"messages": []}) is None


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('secret') }}", "{{ messages[0].content + 1 }}", "{{ '%d' % 'secret' }}"]
)
def test_what_a_template_does_not_take_is_told_without_the_record(
    new_run: Callable[..., Any], template: str
) -> None:
    run = with_template(new_run("gpt2", CHAT), template)
    with pytest.raises(BadRecord, match="chat template does not take it") as caught:
        new_task(run.spec.task, run.assets).example({"prompt": "Hi", "response": "Yo"})
    assert "secret" not in str(caught.value).splitlines()[0]


def test_what_transformers_refuses_is_told_too(
    new_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = new_run("gpt2", CHAT)

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Cannot apply chat template")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.apply_chat_template", refuse)
    with pytest.raises(BadRecord, match="does not take it\nCannot apply"):
        new_task(run.spec.task, run.assets).example({"prompt": "Hi", "response": "Yo"})
