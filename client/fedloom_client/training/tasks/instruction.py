"""Instruction tuning: the answers of conversations are predicted, and nothing else of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedloom_client.training.tasks.base import BaseTask, next_token_labels
from fedloom_client.training.tasks.losses import mean_cross_entropy, token_sums
from fedloom_client.training.tasks.protocol import IGNORED, BadRecord, Example, Inputs, Sums
from fedloom_client.training.tasks.tokenizers import Assets, text_of
from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec import Instruction as Spec

ROLES = ("system", "user", "assistant")

Messages = Sequence[Mapping[str, str]]


class Instruction(BaseTask):
    """Answers in conversations, written by the tokenizer's chat template."""

    fields: Sequence[str] = ()
    needs = "instruction needs records with the fields prompt and response, or messages"

    def __init__(self, spec: Spec, assets: Assets) -> None:
        """Raises TrainingFailed if the tokenizer has no chat template."""
        self._spec, self._assets = spec, assets
        if assets.tokenizer.chat_template is None:
            raise TrainingFailed("the model's tokenizer has no chat template: give the run one that has")
        self.padding = {"input_ids": assets.padding, "labels": IGNORED}

    def example(self, record: Mapping[str, Any]) -> Example | None:
        """A conversation's tokens; those of answers are labels too."""
        spans = self._answers(_messages(record))
        if not spans:
            return None
        tokens, is_answer = self._tokens(spans)
        most = self._spec.context_tokens
        labels = [token if is_one else IGNORED for token, is_one in zip(tokens, is_answer, strict=True)]
        labels = [IGNORED, *labels[1:most]]  # nothing precedes the first
        values = {"input_ids": tokens[:most], "labels": labels}
        if all(label == IGNORED for label in labels):
            return None
        return Example(values=values, is_shortened=len(tokens) > most)

    def loss(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Mean cross-entropy of the answers' tokens."""
        return mean_cross_entropy(_logits(model, inputs), next_token_labels(inputs["labels"]))

    def measure(self, model: nn.Module, inputs: Inputs) -> Sums:
        """The loss over the answers' tokens, and how many of them the model names."""
        return token_sums(_logits(model, inputs), next_token_labels(inputs["labels"]))

    def _answers(self, messages: Messages) -> list[tuple[str, str]]:
        """For each answer, the conversation up to it, and with it and what ends it.

        Answers are told by the template itself: what it writes before one is what it writes when it asks
        for it, so that models are trained on what they will be given. A first turn that is the assistant's
        is asked for by nothing, and belongs to what the next answer is given.
        """
        spans: list[tuple[str, str]] = []
        told = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number == 0:
                continue
            before = self._written(messages[:number], asks=True)
            after = self._written(messages[: number + 1], asks=False)
            if not before.startswith(told) or not after.startswith(before):
                raise BadRecord(
                    "the tokenizer's chat template writes a conversation's beginning differently when it "
                    "has more turns: give records with one answer, or a model with another template"
                )
            spans.append((before, after))
            told = after
        return spans

    def _tokens(self, spans: Sequence[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        """The tokens of the whole conversation, and which of them are the answers'.

        Tokenizers do not write a text as its parts one after the other: those of SentencePiece begin each
        with a space, and words may reach over the parts' ends. So an answer begins where the whole's tokens
        part from those of what is before it, and ends where they part from those of what ends with it.
        """
        *starts, whole = self._assets.encode([text for span in spans for text in span])
        is_answer = [False] * len(whole)
        ends = [_common(start, whole) for start in starts] + [len(whole)]
        for begin, end in zip(ends[::2], ends[1::2], strict=True):
            is_answer[begin:end] = [True] * (end - begin)
        return list(whole), is_answer

    def _written(self, messages: Messages, *, asks: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text: str = self._assets.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=asks
            )
        except (TemplateError, ValueError, TypeError) as error:  # a template's own, and what it does to texts
            raise BadRecord(f"the tokenizer's chat template does not take it\n{error}") from error
        return text


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at the start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _messages(record: Mapping[str, Any]) -> Messages:
    if record.get("messages") is None:
        if "prompt" not in record or "response" not in record:
            raise BadRecord(
                f"it has {', '.join(sorted(record)) or 'no field'}; wanted prompt and response, or messages: "
                "name those that hold them in the data set's fields"
            )
        prompt, response = text_of(record, "prompt"), text_of(record, "response")
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    messages = record["messages"]
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise BadRecord(
            "its messages are no list of {role, content}, with text as content and as role one of "
            f"{', '.join(ROLES)}"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)


def _logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """[examples, tokens, vocabulary]"""
    logits: torch.Tensor = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).logits
    return logits
