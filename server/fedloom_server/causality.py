"""Whether a model's prediction of a token sees that token: if so, its loss means nothing."""

import copy
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedloom_common.errors import BadSpec
from fedloom_common.runspec import CausalLM, Instruction, Task

_TEXT = "The quick brown fox jumps over 13 lazy dogs."
_COPIED_PARAMETERS = 50_000_000
"""Models of half precision up to this size are looked at in fp32, where rounding hides nothing."""
_NOISE = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_NOISE = 0.03
"""Share of the largest logit by which one may differ: a mixture's experts sum other tokens beside it."""


def require_causal(task: Task, model: Any, tokenizer: Tokenizer) -> None:
    """Check that a model that is to predict next tokens does not see them.

    Runs it twice on two tokens, which takes less than its file takes to be read back.

    Raises:
        BadSpec: the second token changes what it makes of the first.
    """
    if not isinstance(task, CausalLM | Instruction):
        return
    ids = list(dict.fromkeys(tokenizer.encode(_TEXT, add_special_tokens=False)))[:3]
    if len(ids) < 3:
        return  # a tokenizer that knows no English has nothing to compare
    was_training = model.training
    try:
        one, other = _logits(model.eval(), [[ids[0], last] for last in ids[1:]])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return  # it takes more than ids, and says at its first step what
    finally:
        model.train(was_training)
    noise = _NOISE.get(one.dtype, _HALF_NOISE) * one.abs().max()
    if (one[0] - other[0]).abs().max() > noise:
        kind = model.config.model_type
        raise BadSpec(
            f"a {kind} of this config reads texts in both directions: it sees the token that it is to "
            f"predict, and {task.kind} would teach it nothing; "
            + ("set is_decoder: true in its config, " if hasattr(model.config, "is_decoder") else "")
            + "take task masked_lm, or choose a model that reads forward only, such as gpt2 or llama"
        )


def _logits(model: Any, texts: list[list[int]]) -> list[torch.Tensor]:
    """Of each text [tokens, vocabulary]; one after the other, for the same kernels."""
    if model.dtype not in _NOISE and model.num_parameters() <= _COPIED_PARAMETERS:
        model = copy.deepcopy(model).float()
    with torch.inference_mode():
        inputs = [torch.tensor([ids]) for ids in texts]
        return [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0] for ids in inputs]
