"""Builds the initial model of a run with transformers, and checks that transformers loads it again.

Runs in a process of its own, see ``models``. Runs no code from a model
directory, reads no pickled weights and fetches nothing.
"""

import difflib
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedloom_common.errors import BadSpec
from fedloom_common.files import storage_errors, sync_folder
from fedloom_common.runspec import Classification, RunSpec
from fedloom_common.tensors import read_tensors, write_tensors
from fedloom_server.bytelevel import byte_tokenizer
from fedloom_server.models import MODEL_FILE
from fedloom_server.taskmodels import (
    complete_config,
    head_options,
    may_draw,
    model_class,
    model_name,
    prepare_tokenizer,
    require_runs,
    require_same_labels,
    special_tokens,
)

# What transformers raises for a wrong config, directory or file.
_MISTAKES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
    SafetensorError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip
# Keys that config classes accept besides those they list.
_OTHER_KEYS = frozenset({"torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor"})
_PROBE = "Naïve  text,\n\twith 漢字 and 🙂."


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
    tokenizer = _tokenizer(spec)
    model, drawn = _new_model(spec, tokenizer) if spec.model.path is None else _pretrained(spec, tokenizer)
    _require_fit(spec, model, tokenizer)
    if spec.model.path is None:
        require_runs(spec.task, model, tokenizer)
    with _mistakes_as_bad_spec("the model cannot be saved"), storage_errors(into / MODEL_FILE):
        _save(model, tokenizer, into)
    del model
    with _mistakes_as_bad_spec("the model as saved cannot be loaded again; choose another model"):
        _require_loadable(into, spec, tokenizer)
    if spec.model.adapter is not None:
        if drawn and not isinstance(spec.task, Classification):
            raise BadSpec(
                f"model.path lacks the head of a {model_name(spec.task)} ({', '.join(drawn)}), which would "
                "begin anew, and adapters leave it as it is: train the whole model, or give one with a head"
            )
        from fedloom_server.initialadapter import write_adapter  # here: peft takes a second to load

        write_adapter(spec, into)
    _sync(into)
    return drawn


def _tokenizer(spec: RunSpec) -> Tokenizer:
    source = spec.model.tokenizer
    if source == "auto":
        source = spec.model.path or "bytes"
    if source == "bytes":
        tokenizer: Tokenizer = byte_tokenizer(**special_tokens(spec.task))
        prepare_tokenizer(spec.task, tokenizer, "model.tokenizer")
        return tokenizer
    key = "model.path" if spec.model.tokenizer == "auto" else "model.tokenizer"
    folder = _folder(source, key)
    with _mistakes_as_bad_spec(f"{key}: {folder} has no tokenizer that transformers loads", (Exception,)):
        # of a file for a newer version the tokenizers library raises an Exception and no kind of it
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for key_of_loading in ("is_local", "local_files_only"):  # transformers would save them with the tokenizer
        tokenizer.init_kwargs.pop(key_of_loading, None)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise BadSpec(
            f"{key}: {folder} has no tokenizer files; save a tokenizer there, or set model.tokenizer to "
            "bytes or to a directory with one"
        )
    prepare_tokenizer(spec.task, tokenizer, f"{key}: {folder}")
    return tokenizer


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
    with _mistakes_as_bad_spec(f"model.config does not make a {model_type} {model_name(spec.task)}"):
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
    folder, name = _folder(spec.model.path, "model.path"), model_name(spec.task)
    if not (folder / "config.json").is_file():
        raise BadSpec(
            f"model.path: {folder} has no config.json; wanted a directory that save_pretrained wrote"
        )
    with _mistakes_as_bad_spec(f"model.path: {folder} has no {name} in safetensors files"):
        require_same_labels(spec.task, json.loads((folder / "config.json").read_bytes()), folder)
        torch.manual_seed(spec.seed)  # for a head that the model lacks
        model, report = _load(folder, spec, **head_options(spec.task))
        missing = sorted(report["missing_keys"])
    whole = [tensor for tensor in missing if not may_draw(spec.task, model, tensor)]
    if whole:
        raise BadSpec(
            f"model.path: {folder} lacks {len(whole)} tensors of a {type(model).__name__}, {whole[0]} "
            f"among them; wanted a whole {name}"
        )
    complete_config(spec.task, model.config, tokenizer)
    return model, missing


def _load(folder: Path, spec: RunSpec, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a directory, in its own types, and what transformers reports of its tensors."""
    loaded: Any = model_class(spec.task).from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto",
        output_loading_info=True, **options,
    )  # fmt: skip
    model, report = loaded
    return model, report


def _folder(path: str, key: str) -> Path:
    """A directory at the coordinator that brings no code of its own."""
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise BadSpec(
            f"{key} is {path!r}, but the coordinator has no directory {folder}; give the path of a directory "
            "on the coordinator's host, as save_pretrained writes it"
        )
    for name in ("config.json", "tokenizer_config.json"):
        with _mistakes_as_bad_spec(f"{key}: {folder / name} cannot be read"):
            file = folder / name
            settings = json.loads(file.read_bytes()) if file.is_file() else {}
        if "auto_map" in settings:
            raise BadSpec(
                f"{key}: {folder / name} has auto_map: models that bring their own code are refused"
            )
    return folder


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


def _save(model: PreTrainedModel, tokenizer: Tokenizer, into: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    write_tensors(into / MODEL_FILE, _each_storage_once(model))
    model.config.save_pretrained(into)
    if model.can_generate():
        model.generation_config.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _each_storage_once(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict without the names that from_pretrained ties to another."""
    state: dict[str, torch.Tensor] = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    once: dict[tuple[object, ...], str] = {}
    for name in sorted(state, key=lambda name: name in tied):
        once.setdefault(_place(name, state[name]), name)
    kept = set(once.values())
    return {name: tensor for name, tensor in state.items() if name in kept}


def _place(name: str, tensor: torch.Tensor) -> tuple[object, ...]:
    """The same for tensors that are one in memory."""
    if tensor.numel() == 0:
        return (name,)  # all empty tensors lie at address 0
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _require_loadable(into: Path, spec: RunSpec, tokenizer: Tokenizer) -> None:
    """Check that what was saved is what sites and users will load."""
    model, report = _load(into, spec)
    for problem, names in report.items():
        if names:
            raise BadSpec(
                f"transformers does not load a saved {type(model).__name__} back: {problem} {names}"
            )
    state = model.state_dict()
    for name, tensor in read_tensors(into / MODEL_FILE):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadSpec(f"the initial model's tensor {name} holds NaN or infinity")
        if name not in state or state[name].dtype != tensor.dtype or not torch.equal(state[name], tensor):
            raise BadSpec(f"transformers loads tensor {name} of a saved {type(model).__name__} differently")
    loaded = AutoTokenizer.from_pretrained(into, local_files_only=True, trust_remote_code=False)
    if loaded.get_vocab() != tokenizer.get_vocab() or loaded.encode(_PROBE) != tokenizer.encode(_PROBE):
        raise BadSpec(
            f"transformers does not load the tokenizer back beside a {model.config.model_type} model; give "
            "model.tokenizer the directory of a tokenizer made for it"
        )


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


@contextmanager
def _mistakes_as_bad_spec(what: str, kinds: tuple[type[Exception], ...] = _MISTAKES) -> Iterator[None]:
    """Tell the user what transformers found wrong with what they gave."""
    try:
        yield
    except kinds as error:
        told = str(error) or type(error).__name__
        if told.startswith("Unrecognized configuration class"):  # and then every class that there is
            told = "transformers has none of that model type; choose another model, or another task.kind"
        raise BadSpec(f"{what}: {told}") from error
