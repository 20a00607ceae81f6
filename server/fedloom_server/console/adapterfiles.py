"""An adapter's run as a directory: one whole model, or the adapter for peft."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedloom.v1.runs_pb2 import ExportResponse
from fedloom.v1.session_pb2 import Blob
from fedloom_common.adapters.layout import BASE_FILE, CONFIG_FILE, FROZEN_A_FILE, LAYOUT_FILE, Layout
from fedloom_common.adapters.merged import AdapterFiles, write_merged, write_whole_adapter
from fedloom_common.errors import BadTensor, ProtocolError
from fedloom_common.files import write_text
from fedloom_common.runspec import RunSpec

MODEL, ADAPTER, MODEL_CONFIG = "model.safetensors", "adapter_model.safetensors", "config.json"
_NOT_OF_MODELS = frozenset({CONFIG_FILE, LAYOUT_FILE})
_NOT_OF_ADAPTERS = frozenset({MODEL, LAYOUT_FILE, MODEL_CONFIG, "generation_config.json"})
_DTYPES = {"F32": "float32", "BF16": "bfloat16"}

PlaceOf = Callable[[Blob], Path]


def made_names(answer: ExportResponse, *, as_adapter: bool) -> set[str]:
    """Names of the files that the directory will have."""
    names = {file.name for file in answer.files}
    return names - _NOT_OF_ADAPTERS | {ADAPTER} if as_adapter else names - _NOT_OF_MODELS


def make_files(
    answer: ExportResponse, place_of: PlaceOf, folder: Path, *, as_adapter: bool, base_name: str
) -> dict[str, Path]:
    """Make the directory's files of those that were fetched; where each lies, by name.

    Weights are computed as sites compute them, and are of the type in which sites hold the frozen ones:
    fp32, or bf16 where the run says so. ``base_name`` is what peft looks for the base under.

    Memory: one weight in fp32; for an adapter with folds the factors of all weights.

    Raises:
        ProtocolError: a file that makes the model is missing, or not what it should be.
    """
    sent = {file.name: place_of(file) for file in answer.files}
    try:
        parts = _parts(answer, place_of, sent)
        if as_adapter:
            made = _make_adapter(parts, sent[CONFIG_FILE], folder, base_name)
        else:
            spec = RunSpec.model_validate_json(answer.run.spec_json)
            made = _make_model(parts, spec, sent[MODEL_CONFIG], folder)
    except (BadTensor, KeyError, ValueError) as error:
        raise ProtocolError(f"the coordinator's files do not make a model: {error}") from error
    names = made_names(answer, as_adapter=as_adapter)
    return {name: path for name, path in (sent | made).items() if name in names}


def _parts(answer: ExportResponse, place_of: PlaceOf, sent: dict[str, Path]) -> AdapterFiles:
    frozen = {file.name: place_of(file) for file in answer.frozen}
    return AdapterFiles(
        base=frozen[BASE_FILE],
        folds=[place_of(file) for file in answer.folds],
        adapter=sent[MODEL],
        layout=Layout.read(sent[LAYOUT_FILE]),
        frozen_a=frozen.get(FROZEN_A_FILE),
    )


def _make_model(parts: AdapterFiles, spec: RunSpec, config: Path, folder: Path) -> dict[str, Path]:
    assert spec.model.adapter is not None, "the run's model is an adapter"
    dtype = "F32" if spec.model.adapter.base_precision == "fp32" else "BF16"
    model, made_config = folder / "made.safetensors", folder / "made.config.json"
    write_merged(parts, model, dtype)
    _write_json(made_config, json.loads(config.read_bytes()) | {"dtype": _DTYPES[dtype]})
    return {MODEL: model, MODEL_CONFIG: made_config}


def _make_adapter(parts: AdapterFiles, config: Path, folder: Path, base_name: str) -> dict[str, Path]:
    adapter, made_config = folder / "made.safetensors", folder / "made.config.json"
    layout, rank = write_whole_adapter(parts, adapter)
    content = json.loads(config.read_bytes()) | {"r": rank, "lora_alpha": layout.alpha}
    if base_name:
        content["base_model_name_or_path"] = base_name
    _write_json(made_config, content)
    return {ADAPTER: adapter, CONFIG_FILE: made_config}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
