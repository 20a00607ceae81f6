"""Causal language models: every token but an example's first is predicted from those before it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedloom_client.training.tasks.losses import perplexity
from fedloom_client.training.tasks.protocol import IGNORED, Arrays, Inputs, Measured, Sums
from fedloom_client.training.tasks.tokenizers import Assets, bytes_of_tokens
from fedloom_common.runspec import CausalLM as Spec


class CausalLM:
    """Next tokens of packed text."""

    padding: Mapping[str, int] = {}
    token_fields: Sequence[str] = ("input_ids",)
    is_even = True
    sampled_examples = 0

    def __init__(self, spec: Spec, assets: Assets) -> None:
        self._spec, self._assets = spec, assets
        self.block_tokens = spec.context_tokens

    @property
    def tokens(self) -> int:
        """Tokens that the tokenizer knows."""
        return len(self._assets.tokenizer)

    @property
    def separator(self) -> int:
        """The end-of-text token."""
        return self._assets.token("eos_token", "end-of-text token to put between documents")

    def packing_key(self) -> str:
        """The tokenizer and the length of an example."""
        return f"{self._assets.digest()} {self._spec.model_dump_json()}"

    def encode_texts(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """The tokens of each text, without special ones."""
        tokenizer = self._assets.tokenizer
        encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        numbers: Sequence[Sequence[int]] = encoded["input_ids"]
        return numbers

    def batch(self, arrays: Arrays, random: Iterator[np.random.Generator]) -> Arrays:
        """The examples as they are."""
        return arrays

    def targets(self, arrays: Arrays) -> int:
        """All tokens but each example's first."""
        return int(arrays["input_ids"][:, 1:].size)

    def loss(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Mean cross-entropy of the next token."""
        examples = inputs["input_ids"]
        logits = model(input_ids=examples, use_cache=False).logits
        targets = examples.roll(-1, dims=1)
        targets[:, -1] = IGNORED  # cutting the logits instead would copy the largest tensor of the step
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def measure(self, model: nn.Module, inputs: Inputs) -> Sums:
        """The loss over all targets, and the bytes of text that they stand for."""
        targets = inputs["input_ids"][:, 1:]
        return {
            "loss": self.loss(model, inputs).double() * targets.numel(),
            "bytes": self._bytes.to(targets.device)[targets].sum(),
        }

    def sample(self, model: nn.Module, inputs: Inputs) -> Sums:
        """Nothing."""
        return {}

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
