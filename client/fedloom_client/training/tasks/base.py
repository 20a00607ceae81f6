"""What tasks have in common, if they do not say otherwise."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from fedloom_client.training.tasks.losses import token_metrics
from fedloom_client.training.tasks.protocol import IGNORED, Arrays, Inputs, Measured, Sums


class BaseTask:
    """A task with labels: one for each target, IGNORED elsewhere."""

    padding: Mapping[str, int] = {}
    token_fields: Sequence[str] = ("input_ids",)
    is_even = False
    sampled_examples = 0

    def batch(self, arrays: Arrays, random: Iterator[np.random.Generator]) -> Arrays:
        """The examples as they are."""
        return arrays

    def targets(self, arrays: Arrays) -> int:
        """Labels that are not IGNORED."""
        return int((arrays["labels"] != IGNORED).sum())

    def sample(self, model: nn.Module, inputs: Inputs) -> Sums:
        """Nothing."""
        return {}

    def metrics(self, sums: Mapping[str, Sequence[float]], targets: int) -> Measured:
        """Loss, perplexity and accuracy over the targets; ``sums`` are those of ``losses.token_sums``."""
        metrics = token_metrics(sums, targets)
        return Measured(metrics=metrics, weights=dict.fromkeys(metrics, targets))


def next_token_labels(labels: torch.Tensor) -> torch.Tensor:
    """The label of each token's successor, where that is what a model predicts: [examples, tokens]."""
    following = labels.roll(-1, dims=1)
    following[:, -1] = IGNORED  # cutting the logits instead would copy the largest tensor of the step
    return following
