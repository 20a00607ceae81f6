"""Sequence to sequence: a target text for each source text, by encoder-decoder models."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fedloom_client.training.tasks.base import BaseTask
from fedloom_client.training.tasks.losses import mean_cross_entropy, token_sums
from fedloom_client.training.tasks.protocol import IGNORED, Arrays, Example, Inputs, Measured, Sums
from fedloom_client.training.tasks.tokenizers import Assets, encode_up_to, text_of
from fedloom_common.runspec import Seq2Seq as Spec


class Seq2Seq(BaseTask):
    """Targets of sources."""

    fields = ("source", "target")
    needs = "seq2seq needs records with the fields source and target"
    token_fields = ("input_ids", "labels")

    def __init__(self, spec: Spec, assets: Assets) -> None:
        self._spec, self._assets = spec, assets
        self._end = assets.token("eos_token", "end-of-text token to end targets with")
        start = assets.config.get("decoder_start_token_id")
        self._start = assets.padding if start is None else int(start)  # as T5 does
        self.padding = {"input_ids": assets.padding, "labels": IGNORED}
        self.sampled_examples = spec.generate_examples

    def example(self, record: Mapping[str, Any]) -> Example | None:
        """The source's tokens, and the target's as labels."""
        tokenizer, spec = self._assets.tokenizer, self._spec
        source = spec.prefix + text_of(record, "source")
        tokens, shortened = encode_up_to(spec.source_tokens, tokenizer, source)
        target = text_of(record, "target")
        labels, cut = encode_up_to(spec.target_tokens, tokenizer, target, as_target=True)
        if not labels or labels[-1] != self._end:
            cut = cut or len(labels) == spec.target_tokens
            labels = [*labels[: spec.target_tokens - 1], self._end]
        if not tokens:
            return None
        return Example(values={"input_ids": tokens, "labels": labels}, is_shortened=shortened or cut)

    def batch(self, arrays: Arrays, random: Iterator[np.random.Generator]) -> Arrays:
        """What the decoder reads is the labels, one later."""
        labels = arrays["labels"]
        earlier = np.roll(labels, 1, axis=1)
        earlier[:, 0] = self._start
        earlier[earlier == IGNORED] = self.padding["input_ids"]
        return arrays | {"decoder_input_ids": earlier}

    def loss(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Mean cross-entropy of the targets' tokens."""
        return mean_cross_entropy(_logits(model, inputs), inputs["labels"])

    def measure(self, model: nn.Module, inputs: Inputs) -> Sums:
        """The loss over the targets' tokens, and how many of them the model names."""
        return token_sums(_logits(model, inputs), inputs["labels"])

    def sample(self, model: nn.Module, inputs: Inputs) -> Sums:
        """What the model writes for the sources, next to the targets: exact matches, and ROUGE-L."""
        written: Any = model
        tokens = written.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self._spec.target_tokens,
            do_sample=False,
            num_beams=1,
            synced_gpus=torch.distributed.is_initialized(),  # sharded models need all ranks in every pass
            decoder_start_token_id=self._start,
            eos_token_id=self._end,
            pad_token_id=self.padding["input_ids"],
        )
        wanted = inputs["labels"].clone()
        wanted[wanted == IGNORED] = self.padding["input_ids"]
        pairs = list(zip(self._texts(tokens), self._texts(wanted), strict=True))
        return {
            "exact": torch.tensor(sum(came == want for came, want in pairs)),
            "rouge_l": torch.tensor(sum(rouge_l(came, want) for came, want in pairs)),
        }

    def metrics(self, sums: Mapping[str, Sequence[float]], targets: int) -> Measured:
        """Loss, perplexity and accuracy over tokens; exact match and ROUGE-L over the sampled examples."""
        measured = super().metrics(sums, targets)
        sampled = int(sums["sampled"][0]) if "sampled" in sums else 0
        if not sampled:
            return measured
        own = {"exact_match": sums["exact"][0] / sampled, "rouge_l": sums["rouge_l"][0] / sampled}
        weights = measured.weights | dict.fromkeys(own, sampled)
        return Measured(metrics=measured.metrics | own, weights=weights)

    def _texts(self, tokens: torch.Tensor) -> list[str]:
        texts = self._assets.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


def rouge_l(came: str, wanted: str) -> float:
    """F-measure of the longest common subsequence of words.

    Words are runs of letters, with their marks, and digits of any script, where the original knows those
    of English alone.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3; torchmetrics.
    """
    from torchmetrics.functional.text import rouge_score  # seconds to import, and only this task needs it

    scores = rouge_score(came, wanted, rouge_keys="rougeL", normalizer=_words)
    return float(scores["rougeL_fmeasure"])


def _words(text: str) -> str:
    runs = "".join(character if _is_of_word(character) else " " for character in text.lower()).split()
    return " ".join(run for run in runs if any(map(str.isalnum, run)))  # a sign may end in a mark


def _is_of_word(character: str) -> bool:
    # vowels of Indic scripts are marks, which are no letters to isalnum and \w
    return character.isalnum() or unicodedata.category(character).startswith("M")


def _logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """[examples, target tokens, vocabulary]"""
    logits: torch.Tensor = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        decoder_input_ids=inputs["decoder_input_ids"],
        use_cache=False,
    ).logits
    return logits
