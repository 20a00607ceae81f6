"""Builds the initial model of a run with transformers, and checks that transformers loads it again.

Runs in a process of its own, see ``models``. Runs no code from a model
directory, reads no pickled weights and fetches nothing.
"""

import difflib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedloom_common.errors import BadSpec
from fedloom_common.files import storage_errors
from fedloom_common.runspec import RunSpec
from fedloom_server.causality import require_causal
from fedloom_server.givenfolder import model_folder, require_model_files, tokenizer_of
from fedloom_server.modelfolder import (
    load_model,
    mistakes_as_bad_spec,
    require_loadable,
    save_model,
    sync_files,
)
from fedloom_server.models import MODEL_FILE
from fedloom_server.taskmodels import (
    complete_config,
    head_options,
    may_draw,
    model_class,
    model_name,
    require_runs,
    require_same_labels,
)

# Keys that config classes accept besides those they list.
_OTHER_KEYS = frozenset({"torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor"})


def write_model(spec: RunSpec, into: Path) -> list[str]:
    """Write the files of the model that ``spec.model`` describes to an empty or missing folder.

    Gives the tensors that a pretrained model lacked and that were drawn from the seed.

    Memory: one model, and one more tensor.

    Raises:
        BadSpec: the model does not exist, cannot be built, or is not fit for the task.
        StorageFull: the folder's file system has no space left.
    """
    into.mkdir(parents=True, exist_ok=True)
    assert not any(into.iterdir()), f"{into} is not empty"
    if spec.model.path is not None:
        require_model_files(model_folder(spec.model.path, "model.path"))
    tokenizer = tokenizer_of(spec)
    model, drawn = _new_model(spec, tokenizer) if spec.model.path is None else _pretrained(spec, tokenizer)
    _require_fit(spec, model, tokenizer)
    if spec.model.path is None:
        require_runs(spec.task, model, tokenizer)
    require_causal(spec.task, model, tokenizer)
    with mistakes_as_bad_spec("the model cannot be saved"), storage_errors(into / MODEL_FILE):
        save_model(model, tokenizer, into)
    del model
    with mistakes_as_bad_spec("the model as saved cannot be loaded again; choose another model"):
        require_loadable(into, spec, tokenizer)
    if spec.model.adapter is not None:
        from fedloom_server.initialadapter import write_adapter  # here: peft takes a second to load

        heads = write_adapter(spec, into).heads
        if untrained := [name for name in drawn if name not in heads]:
            raise BadSpec(
                f"model.path lacks {', '.join(untrained)} of a {model_name(spec.task)}, which would begin "
                "anew, and adapters leave it as it is: train the whole model, or give one that has it"
            )
    sync_files(into)
    return drawn


def _new_model(spec: RunSpec, tokenizer: Tokenizer) -> tuple[PreTrainedModel, list[str]]:
    """A model with random weights."""
    assert spec.model.config is not None
    given = dict(spec.model.config)
    model_type = given.pop("model_type")
    if str(model_type) not in CONFIG_MAPPING:
        raise BadSpec(
            f"model.config.model_type is {model_type!r}, which transformers {transformers.__version__} "
            f"does not have{_hint(str(model_type), CONFIG_MAPPING)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    with mistakes_as_bad_spec(f"model.config does not make a {model_type} {model_name(spec.task)}"):
        known = {*inspect.signature(config_class).parameters, *config_class().to_dict()}
        _require_known({*known, *config_class.attribute_map, *_OTHER_KEYS}, given, model_type)
        for key, value in _vocabulary(tokenizer).items():
            if key in known:
                given.setdefault(key, value)
        config = config_class(**given | head_options(spec.task))
        complete_config(spec.task, config, tokenizer)
        torch.manual_seed(spec.seed)
        model: PreTrainedModel = model_class(spec.task).from_config(config)
    return model, []


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int | None]:
    """What a config says of its tokenizer."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    return {
        "vocab_size": _tokens(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": None if pad == eos else pad,  # its embedding is frozen, and that of eos must not be
    }


def _tokens(tokenizer: Tokenizer) -> int:
    """Embeddings that the tokenizer needs: ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def _require_known(known: set[str], given: dict[str, Any], model_type: str) -> None:
    """Config classes keep unknown keys silently, so a misspelt one would have no effect."""
    for key in given:
        if key not in known:
            raise BadSpec(f"model.config.{key}: {model_type} has no such key{_hint(key, known)}")


def _hint(came: str, known: Any) -> str:
    close = difflib.get_close_matches(came, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ": see its documentation"


def _pretrained(spec: RunSpec, tokenizer: Tokenizer) -> tuple[PreTrainedModel, list[str]]:
    """The model of a local directory, and the tensors of its head that are drawn because it has none."""
    assert spec.model.path is not None
    folder, name = model_folder(spec.model.path, "model.path"), model_name(spec.task)
    with mistakes_as_bad_spec(f"model.path: {folder} has no {name} in safetensors files"):
        require_same_labels(spec.task, json.loads((folder / "config.json").read_bytes()), folder)
        torch.manual_seed(spec.seed)  # for a head that the model lacks
        model, report = load_model(folder, spec, **head_options(spec.task))
        missing = sorted(report["missing_keys"])
    whole = [tensor for tensor in missing if not may_draw(spec.task, model, tensor)]
    if whole:
        raise BadSpec(
            f"model.path: {folder} lacks {len(whole)} tensors of a {type(model).__name__}, {whole[0]} "
            f"among them; wanted a whole {name}"
        )
    complete_config(spec.task, model.config, tokenizer)
    return model, missing


def _require_fit(spec: RunSpec, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Check that the model has room for the tokenizer's ids and the task's context."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < 0:  # XLNet's way to say that there is no limit
        positions = None
    if positions is not None:
        positions -= _reserved_positions(model)
    if positions is not None and spec.task.longest > positions:
        key = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        raise BadSpec(
            f"the task reads {spec.task.longest} tokens at once, but the model has {positions} positions "
            f"({key}); lower task.context_tokens, or raise that"
        )
    embeddings = next(model.get_input_embeddings().parameters()).shape[0]
    if _tokens(tokenizer) > embeddings:
        raise BadSpec(
            f"the tokenizer has {_tokens(tokenizer)} tokens, but the model has embeddings for {embeddings} "
            "(vocab_size); leave vocab_size out of model.config, or choose the model's own tokenizer"
        )


def _reserved_positions(model: PreTrainedModel) -> int:
    """Positions up to that of padding, which RoBERTa and its like give to no token."""
    fillers = [
        module.padding_idx
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
    ]
    return max((filler + 1 for filler in fillers if filler is not None), default=0)
