"""A task of one's own: a tag for every word, such as names of people and places in letters.

Records hold ``words``, a list of texts, and ``tags``, a list of as many names. The run spec's
``task.options`` list the names: ``{tags: [other, person, place]}``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedloom_client.training.tasks import (
    IGNORED,
    BadRecord,
    BaseTask,
    Example,
    Inputs,
    Measured,
    PluginSetting,
    Sums,
    label_metrics,
    label_sums,
    mean_cross_entropy,
)


class WordTags(BaseTask):
    """Tags of words; the first token of a word carries its tag."""

    fields = ("words", "tags")
    needs = "word tags need records with the fields words and tags"

    def __init__(self, setting: PluginSetting) -> None:
        self._names: list[str] = list(setting.options["tags"])
        self._tokenizer, self._most = setting.tokenizer, setting.context_tokens
        self.padding = {"input_ids": setting.padding, "labels": IGNORED}

    def example(self, record: Mapping[str, Any]) -> Example | None:
        """The words' tokens one after the other, and their tags."""
        words, tags = record["words"], record["tags"]
        if len(words) != len(tags):
            raise BadRecord(f"it has {len(words)} words and {len(tags)} tags, wanted as many")
        unknown = sorted(set(tags) - set(self._names))
        if unknown:
            known = ", ".join(self._names)
            raise BadRecord(
                f"a tag of it is none of {known}\nthe tag is {unknown[0]!r}"
            )  # the rest stays here
        tokens: list[int] = []
        labels: list[int] = []
        for word, tag in zip(words, tags, strict=True):
            part = self._tokenizer(word, add_special_tokens=False)["input_ids"]
            tokens += part
            labels += [self._names.index(tag), *[IGNORED] * (len(part) - 1)][: len(part)]
        if not tokens:
            return None
        values = {"input_ids": tokens[: self._most], "labels": labels[: self._most]}
        return Example(values=values, is_shortened=len(tokens) > self._most)

    def loss(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Mean cross-entropy of the tags."""
        return mean_cross_entropy(self._logits(model, inputs), inputs["labels"])

    def measure(self, model: nn.Module, inputs: Inputs) -> Sums:
        """The loss over all words; by tag, how many are predicted, actual, and both."""
        return label_sums(self._logits(model, inputs), inputs["labels"])

    def metrics(self, sums: Mapping[str, Sequence[float]], targets: int) -> Measured:
        """Loss, accuracy over words, and macro F1 over tags."""
        return label_metrics(sums, targets)

    def _logits(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """[examples, tokens, tags]"""
        logits: torch.Tensor = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
        return logits
