"""Masked language models: tokens that are hidden are predicted from those around them."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedloom_client.training.tasks.base import BaseTask
from fedloom_client.training.tasks.losses import mean_cross_entropy, token_sums
from fedloom_client.training.tasks.protocol import IGNORED, Arrays, Inputs, Sums
from fedloom_client.training.tasks.tokenizers import Assets
from fedloom_common.runspec import MaskedLM as Spec

HIDDEN, HIDDEN_OR_RANDOM = 0.8, 0.9  # of the targets; the rest stay as they are


class MaskedLM(BaseTask):
    """Hidden tokens of packed text.

    Blocks of text begin and end with the tokenizer's classification and separator tokens, if it has them.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1.
    """

    def __init__(self, spec: Spec, assets: Assets) -> None:
        self._assets, self._share = assets, spec.masked_share
        tokenizer = assets.tokenizer
        self._mask = assets.token("mask_token", "mask token to hide others with")
        self._first = [] if tokenizer.cls_token_id is None else [tokenizer.cls_token_id]
        self._last = [] if tokenizer.sep_token_id is None else [tokenizer.sep_token_id]
        self.tokens = assets.tokens
        self.block_tokens = spec.context_tokens - len(self._first) - len(self._last)

    @property
    def separator(self) -> int:
        """The separator token, or the end-of-text token."""
        if self._last:
            return int(self._last[0])
        return self._assets.token("eos_token", "end-of-text token, nor a sep_token, to put between documents")

    def encode_texts(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """The tokens of each text, without special ones."""
        return self._assets.encode(texts)

    def batch(self, arrays: Arrays, random: Iterator[np.random.Generator]) -> Arrays:
        """Some tokens hidden, and what they were as labels."""
        tokens = arrays["input_ids"].astype(np.int64)
        inputs, labels = tokens.copy(), np.full_like(tokens, IGNORED)
        for row, generator in enumerate(random):
            self._hide(tokens[row], inputs[row], labels[row], generator)
        first, last = (
            np.tile(np.array(ends, np.int64), (len(tokens), 1)) for ends in (self._first, self._last)
        )
        around = [np.full_like(ends, IGNORED) for ends in (first, last)]
        return {
            "input_ids": np.concatenate([first, inputs, last], axis=1),
            "labels": np.concatenate([around[0], labels, around[1]], axis=1),
        }

    def loss(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Mean cross-entropy of the hidden tokens."""
        return mean_cross_entropy(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])

    def measure(self, model: nn.Module, inputs: Inputs) -> Sums:
        """The loss over the hidden tokens, and how many of them the model names."""
        return token_sums(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])

    def _hide(
        self, tokens: NDArray[np.int64], inputs: NDArray[np.int64], labels: NDArray[np.int64],
        generator: np.random.Generator,
    ) -> None:  # fmt: skip
        chance = np.where(np.isin(tokens, self._special), np.inf, generator.random(len(tokens)))
        # One token at least, as BERT has it: a short text would else teach nothing, and count for nothing.
        is_target = chance <= max(self._share, chance.min(initial=1))
        fate = generator.random(len(tokens))
        other = generator.integers(self.tokens, size=len(tokens))
        labels[is_target] = tokens[is_target]
        inputs[is_target & (fate < HIDDEN)] = self._mask
        replaced = is_target & (fate >= HIDDEN) & (fate < HIDDEN_OR_RANDOM)
        inputs[replaced] = other[replaced]

    @cached_property
    def _special(self) -> NDArray[np.int64]:
        return np.array(self._assets.tokenizer.all_special_ids, np.int64)
