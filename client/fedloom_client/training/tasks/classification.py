"""Classification: one of several labels for each text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedloom_client.training.tasks.base import BaseTask
from fedloom_client.training.tasks.losses import label_metrics, label_sums, mean_cross_entropy
from fedloom_client.training.tasks.protocol import IGNORED, BadRecord, Example, Inputs, Measured, Sums
from fedloom_client.training.tasks.tokenizers import Assets, encode_up_to, text_of
from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec import Classification as Spec

LABELS_TOLD = 20


class Classification(BaseTask):
    """Labels of texts."""

    fields = ("text", "label")
    needs = "classification needs records with the fields text and label"
    is_even = True

    def __init__(self, spec: Spec, assets: Assets) -> None:
        """Raises TrainingFailed if the model has other labels."""
        self._spec, self._assets = spec, assets
        outputs = len(assets.config.get("id2label") or range(2))  # transformers leaves its default of two out
        if outputs != len(spec.labels):
            raise TrainingFailed(f"the task has {len(spec.labels)} labels, the model's config has {outputs}")
        self._numbers = {name: number for number, name in enumerate(spec.labels)}
        self.padding = {"input_ids": assets.padding, "labels": IGNORED}

    def example(self, record: Mapping[str, Any]) -> Example | None:
        """The text's tokens, with special ones, and its label's number."""
        tokens, is_shortened = encode_up_to(
            self._spec.context_tokens, self._assets.tokenizer, text_of(record, "text")
        )
        values = {"input_ids": tokens, "labels": [self._label(record["label"])]}
        return Example(values=values, is_shortened=is_shortened) if tokens else None

    def loss(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Mean cross-entropy of the labels."""
        return mean_cross_entropy(_logits(model, inputs), inputs["labels"][:, 0])

    def measure(self, model: nn.Module, inputs: Inputs) -> Sums:
        """The loss over all texts; by label, how many are predicted, actual, and both."""
        return label_sums(_logits(model, inputs), inputs["labels"][:, 0])

    def metrics(self, sums: Mapping[str, Sequence[float]], targets: int) -> Measured:
        """Loss, accuracy and macro F1."""
        return label_metrics(sums, targets)

    def _label(self, came: object) -> int:
        if isinstance(came, str) and came in self._numbers:
            return self._numbers[came]
        if isinstance(came, int) and not isinstance(came, bool):
            if self._numbers.get(str(came), came) != came:
                raise BadRecord(
                    "its label is a number, and the task's labels are numerals in another order than from 0: "
                    f"write the record's label as text, which is a name\nthe label is {came!r}"
                )
            if 0 <= came < len(self._numbers):
                return came
        known = ", ".join(self._spec.labels[:LABELS_TOLD]) + (
            ", …" if len(self._numbers) > LABELS_TOLD else ""
        )
        raise BadRecord(
            f"its label is none of {known}, nor a number from 0 to {len(self._numbers) - 1}: correct the "
            f"record, or the labels of the run's task\nthe label is {came!r}"
        )


def _logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """[examples, labels]"""
    logits: torch.Tensor = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).logits
    return logits
