"""Causal language models: every token but an example's first is predicted from those before it."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional

from fedloom_client.training.tasks.base import BaseTask, next_token_labels
from fedloom_client.training.tasks.losses import perplexity
from fedloom_client.training.tasks.protocol import Arrays, Inputs, Measured, Sums
from fedloom_client.training.tasks.tokenizers import Assets, bytes_of_tokens
from fedloom_common.runspec import CausalLM as Spec


class CausalLM(BaseTask):
    """Next tokens of packed text."""

    is_even = True

    def __init__(self, spec: Spec, assets: Assets) -> None:
        self._assets = assets
        self.block_tokens = spec.context_tokens

    @property
    def tokens(self) -> int:
        """One more than the tokenizer's largest."""
        return self._assets.tokens

    @property
    def separator(self) -> int:
        """The end-of-text token."""
        return self._assets.token("eos_token", "end-of-text token to put between documents")

    def encode_texts(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """The tokens of each text, without special ones."""
        return self._assets.encode(texts)

    def targets(self, arrays: Arrays) -> int:
        """All tokens but each example's first."""
        return int(arrays["input_ids"][:, 1:].size)

    def loss(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Mean cross-entropy of the next token."""
        examples = inputs["input_ids"]
        logits = model(input_ids=examples, use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), next_token_labels(examples).flatten())

    def measure(self, model: nn.Module, inputs: Inputs) -> Sums:
        """The loss over all targets, and the bytes of text that they stand for."""
        targets = inputs["input_ids"][:, 1:]
        return {
            "loss": self.loss(model, inputs).double() * targets.numel(),
            "bytes": self._bytes.to(targets.device)[targets].sum(),
        }

    def metrics(self, sums: Mapping[str, Sequence[float]], targets: int) -> Measured:
        """Loss, perplexity, and bits per byte: what other tokenizers' models can be compared by."""
        loss, size = sums["loss"][0] / targets, int(sums["bytes"][0])
        metrics, weights = {"loss": loss, "perplexity": perplexity(loss)}, {}
        if size:
            metrics["bits_per_byte"], weights["bits_per_byte"] = sums["loss"][0] / math.log(2) / size, size
        return Measured(metrics=metrics, weights=weights)

    @cached_property
    def _bytes(self) -> torch.Tensor:
        return torch.tensor(bytes_of_tokens(self._assets.tokenizer))
