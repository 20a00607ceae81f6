"""What a model is trained to do: the loss on a batch, and the metrics that a site reports."""

import math
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional


class Task(Protocol):
    """One kind of training. Its losses are means over the targets of a batch."""

    def targets(self, example_tokens: int) -> int:
        """Tokens of an example that the loss is taken on."""
        ...

    def loss(self, model: nn.Module, examples: torch.Tensor) -> torch.Tensor:
        """Mean loss over a batch [examples, tokens], in nats a token."""
        ...

    def metrics(self, loss: float) -> dict[str, float]:
        """What to report of the mean loss over held-out data."""
        ...


class CausalLM:
    """Every token but an example's first is predicted from those before it."""

    def targets(self, example_tokens: int) -> int:
        """All but the first."""
        return example_tokens - 1

    def loss(self, model: nn.Module, examples: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the next token."""
        logits = model(input_ids=examples, use_cache=False).logits
        targets = examples.roll(-1, dims=1)
        targets[:, -1] = -100  # ignored; cutting the logits instead would copy the largest tensor of the step
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def metrics(self, loss: float) -> dict[str, float]:
        """Loss and perplexity."""
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # a double holds no more
