"""A model's folder, as transformers writes and loads it: what sites and users get."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedloom_common.errors import BadSpec
from fedloom_common.files import sync_folder
from fedloom_common.runspec import RunSpec
from fedloom_common.tensors import read_tensors, write_tensors
from fedloom_server.models import MODEL_FILE
from fedloom_server.taskmodels import model_class

# What transformers raises for a wrong config, directory or file.
_MISTAKES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
    SafetensorError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip
_PROBE = "Naïve  text,\n\twith 漢字 and 🙂."


def load_model(folder: Path, spec: RunSpec, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a directory, in its own types, and what transformers reports of its tensors."""
    loaded: Any = model_class(spec.task).from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto",
        output_loading_info=True, **options,
    )  # fmt: skip
    model, report = loaded
    return model, report


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, into: Path) -> None:
    """Write the files of a model and its tokenizer, in the model's own types, each tensor once."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    write_tensors(into / MODEL_FILE, _each_storage_once(model))
    model.config.save_pretrained(into)
    if model.can_generate():
        model.generation_config.save_pretrained(into)
    tokenizer.save_pretrained(into)


def require_loadable(into: Path, spec: RunSpec, tokenizer: Tokenizer) -> None:
    """Check that what was saved is what sites and users will load.

    Raises:
        BadSpec: it is not, or a value is not finite.
    """
    model, report = load_model(into, spec)
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
    if not same_tokenizer(loaded, tokenizer):
        raise BadSpec(
            f"transformers does not load the tokenizer back beside a {model.config.model_type} model; give "
            "model.tokenizer the directory of a tokenizer made for it"
        )


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give a text the same ids, as far as a look at them tells."""
    return bool(one.get_vocab() == other.get_vocab() and one.encode(_PROBE) == other.encode(_PROBE))


def sync_files(folder: Path) -> None:
    """Make a folder's files durable, and the folder."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


@contextmanager
def mistakes_as_bad_spec(what: str, kinds: tuple[type[Exception], ...] = _MISTAKES) -> Iterator[None]:
    """Tell the user what transformers found wrong with what they gave.

    Raises:
        BadSpec: something was, with ``what`` and transformers' own words.
    """
    try:
        yield
    except kinds as error:
        told = str(error) or type(error).__name__
        if told.startswith("Unrecognized configuration class"):  # and then every class that there is
            told = "transformers has none of that model type; choose another model, or another task.kind"
        raise BadSpec(f"{what}: {told}") from error


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
