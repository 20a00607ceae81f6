"""The folders that an operator gives for a model and its tokenizer, checked before transformers reads them.

What transformers says of a folder that lacks a file is often about something else.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedloom_common.errors import BadSpec
from fedloom_common.runspec import RunSpec
from fedloom_server.bytelevel import byte_tokenizer
from fedloom_server.modelfolder import mistakes_as_bad_spec, same_tokenizer
from fedloom_server.taskmodels import prepare_tokenizer, special_tokens

_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken")
_POINTER = b"version https://git-lfs"


def model_folder(path: str, key: str) -> Path:
    """A directory at the coordinator that brings no code of its own.

    Raises:
        BadSpec: there is none, or it does; ``key`` is where the spec names it.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise BadSpec(
            f"{key} is {path!r}, but the coordinator has no directory {folder}; give the path of a directory "
            "on the coordinator's host, as save_pretrained writes it"
        )
    for name in ("config.json", "tokenizer_config.json"):
        with mistakes_as_bad_spec(f"{key}: {folder / name} cannot be read"):
            file = folder / name
            settings = json.loads(file.read_bytes()) if file.is_file() else {}
        if "auto_map" in settings:
            raise BadSpec(
                f"{key}: {folder / name} has auto_map: models that bring their own code are refused"
            )
    return folder


def require_model_files(folder: Path) -> None:
    """Check that a model's folder has a config, and whole tensors.

    Raises:
        BadSpec: a file is missing, stands for another or is broken off.
    """
    if not (folder / "config.json").is_file():
        raise BadSpec(
            f"model.path: {folder} has no config.json; wanted a directory that save_pretrained wrote"
        )
    for file in sorted(folder.glob("model*.safetensors")):  # those that transformers loads
        _require_fetched(file, "model.path")
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise BadSpec(
                f"model.path: {file} cannot be read ({error}): it is broken off, or no safetensors file; "
                f"fetch {file.name} again"
            ) from error


def tokenizer_of(spec: RunSpec) -> Tokenizer:
    """The tokenizer that ``spec.model`` describes, with all that the task needs.

    Raises:
        BadSpec: there is none, or it lacks something.
    """
    source = spec.model.tokenizer
    if source == "auto":
        source = spec.model.path or "bytes"
    if source == "bytes":
        tokenizer: Tokenizer = byte_tokenizer(**special_tokens(spec.task))
        prepare_tokenizer(spec.task, tokenizer, "model.tokenizer")
        return tokenizer
    key = "model.path" if spec.model.tokenizer == "auto" else "model.tokenizer"
    folder = model_folder(source, key)
    tokenizer = _loaded_tokenizer(folder, key)
    prepare_tokenizer(spec.task, tokenizer, f"{key}: {folder}")
    return tokenizer


def is_of_another_tokenizer(spec: RunSpec) -> bool:
    """Whether a pretrained model has a tokenizer of its own, and would learn from the ids of another."""
    if spec.model.path is None or spec.model.tokenizer == "auto":
        return False
    folder = model_folder(spec.model.path, "model.path")
    try:
        own = _loaded_tokenizer(folder, "model.path")
    except BadSpec:
        return False  # it has none
    return not same_tokenizer(own, tokenizer_of(spec))


def _loaded_tokenizer(folder: Path, key: str) -> Tokenizer:
    nothing = BadSpec(
        f"{key}: {folder} has no tokenizer files, such as tokenizer.json; save or fetch them there, or set "
        "model.tokenizer to bytes or to a directory with some"
    )
    file = folder / "tokenizer.json"
    if file.is_file():
        _require_fetched(file, key)
    lack = "" if file.is_file() else " (and no tokenizer.json, which needs no other package)"
    what = f"{key}: {folder} has no tokenizer that transformers loads{lack}"
    try:
        with mistakes_as_bad_spec(what, (Exception,)):
            # of a file for a newer version the tokenizers library raises an Exception and no kind of it
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except BadSpec:
        if any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
            raise
        raise nothing from None  # transformers would tell of packages for files that are not there
    for key_of_loading in ("is_local", "local_files_only"):  # transformers would save them with the tokenizer
        tokenizer.init_kwargs.pop(key_of_loading, None)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise nothing
    return tokenizer


def _require_fetched(file: Path, key: str) -> None:
    with mistakes_as_bad_spec(f"{key}: {file} cannot be read"), file.open("rb") as start:
        is_pointer = start.read(len(_POINTER)) == _POINTER
    if is_pointer:
        raise BadSpec(
            f"{key}: {file} is a git-lfs pointer and not the file itself; run git lfs pull there, or fetch "
            f"{file.name} again"
        )
