"""What a run's task asks of its model: the class, the head, the tokenizer's special tokens.

Used by the process that makes initial models alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedloom_common.errors import BadSpec
from fedloom_common.runspec import CausalLM, Classification, Instruction, MaskedLM, Plugin, Seq2Seq, Task

PLAIN_CHAT = (
    "{% for message in messages %}{{ ('' if loop.first else '\\n\\n') + '### ' + message['role'] + '\\n' }}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### assistant\\n' }}{% endif %}"
)
"""The chat template of tokenizers that have none."""

_INPUTS = ("input_ids", "attention_mask")
_NAMES = {
    CausalLM: "causal language model",
    MaskedLM: "masked language model",
    Classification: "sequence classifier",
    Seq2Seq: "sequence-to-sequence model",
    Instruction: "causal language model",
}


def model_class(task: Task) -> Any:
    """The class of transformers that makes the task's models.

    Raises:
        BadSpec: transformers has none of that name.
    """
    found = getattr(transformers, task.model_class, None)
    if found is None:
        raise BadSpec(f"task.auto_class is {task.model_class}, which transformers does not have")
    return found


def model_name(task: Task) -> str:
    """What people call the task's models."""
    return _NAMES.get(type(task), task.model_class)


def head_options(task: Task) -> dict[str, Any]:
    """Entries of a config that the task decides."""
    if isinstance(task, Plugin):
        return dict(task.model_options)
    if not isinstance(task, Classification):
        return {}
    return {
        "num_labels": len(task.labels),
        "id2label": dict(enumerate(task.labels)),
        "label2id": {name: number for number, name in enumerate(task.labels)},
    }


def require_same_labels(task: Task, config: Mapping[str, Any], folder: object) -> None:
    """Check that a model that was trained to tell labels apart knows them by the task's numbers.

    Raises:
        BadSpec: it knows the same names by other numbers.
    """
    known = list((config.get("id2label") or {}).values())
    if isinstance(task, Classification) and set(known) == set(task.labels) and known != list(task.labels):
        raise BadSpec(
            f"task.labels are {', '.join(task.labels)}, and those of the model in {folder} are in another "
            f"order: {', '.join(known)}; give them in its order"
        )


def may_draw(task: Task, model: Any, tensor: str) -> bool:
    """Whether a tensor that a pretrained model lacks is of the head, which a task may begin anew."""
    has_own_head = isinstance(task, Classification | MaskedLM | Plugin)
    base = f"{model.base_model_prefix}."
    return has_own_head and (not tensor.startswith(base) or ".pooler." in tensor)


def special_tokens(task: Task) -> dict[str, str]:
    """Special tokens that the task needs of the tokenizer ``bytes``, besides the one that ends a text."""
    if isinstance(task, MaskedLM):
        return {"mask_token": "<|mask|>"}
    return {"pad_token": "<|pad|>"} if isinstance(task, Classification | Seq2Seq | Plugin) else {}


def prepare_tokenizer(task: Task, tokenizer: Tokenizer, key: str) -> None:
    """Check that a tokenizer has what the task needs, and give it a chat template if that needs one.

    Raises:
        BadSpec: a special token is missing.
    """
    wanted = {"eos_token": "separates texts"}
    if isinstance(task, MaskedLM):
        separator = "sep_token" if tokenizer.sep_token_id is not None else "eos_token"
        wanted = {"mask_token": "hides others", separator: "separates texts"}
    elif isinstance(task, Classification | Plugin):
        wanted = {} if tokenizer.pad_token_id is not None else {"eos_token": "fills batches up"}
    for name, what_for in wanted.items():
        if getattr(tokenizer, f"{name}_id") is None:
            raise BadSpec(
                f"{key}: the tokenizer has no {name}, which {what_for}; set one in its tokenizer_config.json"
            )
    if isinstance(task, Instruction) and tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT


def complete_config(task: Task, config: Any, tokenizer: Tokenizer) -> None:
    """Say what batches are filled up with, and what a decoder begins with, if the config does not."""
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    known = getattr(config, "pad_token_id", None)
    if isinstance(task, Classification | Seq2Seq) and (known is None or known < 0):  # old Llamas have -1
        config.pad_token_id = filler
    if isinstance(task, Seq2Seq) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id


def require_runs(task: Task, model: Any, tokenizer: Tokenizer) -> None:
    """Check that a new model takes a text as this tokenizer gives it; its configuration may have gaps.

    Raises:
        BadSpec: it does not.
    """
    if isinstance(task, Plugin):
        return  # what it is given is known at the sites alone
    inputs = {key: value for key, value in tokenizer("A", return_tensors="pt").items() if key in _INPUTS}
    if isinstance(task, Seq2Seq):
        inputs["labels"] = inputs["input_ids"]
    model.eval()
    try:
        with torch.inference_mode():
            model(**inputs)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BadSpec(
            f"model.config makes a {type(model).__name__} that does not take a text as its tokenizer gives "
            f"it ({type(error).__name__}: {error}); give a tokenizer with the special tokens that this model "
            "expects, say which they are in model.config, or choose another model_type"
        ) from error
    finally:
        model.train()
