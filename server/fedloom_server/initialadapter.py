"""Makes a new adapter for a run's initial model, by peft's rules for which layers get one.

Runs in the process that makes the initial model. The model becomes the frozen base; weights are not
needed for it, so peft sees the model on torch's meta device, and costs no memory.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_CHOICES
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from fedloom_common.adapters.folds import write_arrays
from fedloom_common.adapters.layout import (
    BASE_FILE,
    CONFIG_FILE,
    FROZEN_A_FILE,
    PREFIX,
    Layout,
    Target,
    head_name,
    read_values,
)
from fedloom_common.errors import BadSpec
from fedloom_common.files import write_text
from fedloom_common.runspec import Lora, RunSpec
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import Manifest, read_tensors
from fedloom_server.adapters.fresh import draw_a
from fedloom_server.models import MODEL_FILE

ALL_LINEAR = "all-linear"
PEFT_TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
}
"""peft's names of what a model is for, by transformers' class; it knows no masked language model."""


def write_adapter(spec: RunSpec, folder: Path) -> Layout:
    """Turn a folder with a model into one with a frozen base and a new adapter for it.

    Raises:
        BadSpec: the model has none of the layers that should get an adapter, or they cannot have one.
    """
    adapter = spec.model.adapter
    assert adapter is not None, "no adapter is asked for"
    (folder / MODEL_FILE).rename(folder / BASE_FILE)
    if spec.model.path is not None:
        _keep_original(Path(spec.model.path).expanduser(), folder / BASE_FILE)
    module = _outline(folder)
    heads = _heads(module) if spec.task.model_class.endswith("ForSequenceClassification") else {}
    config = _inject(adapter, module, spec.task.model_class, sorted(heads))
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    layout = Layout(
        alpha=adapter.alpha,
        targets=tuple(_targets(layers, folder / BASE_FILE)),
        heads=tuple(name for names in heads.values() for name in names),
    )
    layout.write(folder)
    _write_tensors(spec.seed, adapter, layout, layers, folder)
    _write_config(config, spec.model.path, folder)
    return layout


def _keep_original(source: Path, base: Path) -> None:
    """Take the bytes of the model directory's own file if it holds the same tensors.

    Its digest is then that of the file as it was published, and a site that has it needs no download.
    """
    original = source / "model.safetensors"
    if not original.is_file():
        return
    ours, theirs = Manifest.read(base), Manifest.read(original)
    shapes = [{info.name: (info.dtype, info.shape) for info in file.tensors} for file in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return
    pairs = dict(read_tensors(base))
    if all(torch.equal(pairs[name], tensor) for name, tensor in read_tensors(original)):
        shutil.copyfile(original, base)


def _outline(folder: Path) -> torch.nn.Module:
    """The model's layers, without values."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        module: torch.nn.Module = getattr(transformers, config.architectures[0])(config)
    return module


def _heads(module: Any) -> dict[str, list[str]]:
    """Weights outside of the pretrained body, by the layer that holds them: a task's own, and often new."""
    layers = {name: layer for name, layer in module.named_children() if name != module.base_model_prefix}
    heads = {
        name: [f"{name}.{inner}" for inner, _ in layer.named_parameters()] for name, layer in layers.items()
    }
    return {name: weights for name, weights in heads.items() if weights}


def _inject(adapter: Lora, module: Any, model_class: str, heads: list[str]) -> LoraConfig:
    """Give the outline's layers their adapters; the config that does the same at every site."""
    wanted: str | tuple[str, ...] = adapter.target_modules
    if wanted == "auto":
        chosen = PEFT_CHOICES.get(module.config.model_type, ALL_LINEAR)
        wanted = chosen if isinstance(chosen, str) else tuple(chosen)
    config = LoraConfig(
        r=adapter.largest_rank, lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft only divides it
        lora_dropout=adapter.dropout,
        target_modules=wanted if isinstance(wanted, str) else list(wanted),
        modules_to_save=heads or None,
        exclude_modules="|".join(rf"{head}(\..*)?" for head in heads) or None,
        task_type=PEFT_TASKS.get(model_class),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in module.modules()),
    )  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that it finds otherwise than it was told
            inject_adapter_in_model(config, module)
    except ValueError as error:
        linear = sorted(
            {name.rsplit(".", 1)[-1] for name, layer in module.named_modules() if _is_linear(layer)}
        )
        raise BadSpec(
            f"model.adapter.target_modules: {error}; linear layers of this model end in {', '.join(linear)}"
        ) from error
    return config


def _is_linear(layer: torch.nn.Module) -> bool:
    return isinstance(layer, torch.nn.Linear | Conv1D)


def _targets(layers: dict[str, Any], base: Path) -> Iterator[Target]:
    known = {info.name for info in Manifest.read(base).tensors}
    for name, layer in layers.items():
        if not _is_linear(layer.get_base_layer()):
            raise BadSpec(
                f"model.adapter.target_modules names {name}, a {type(layer.get_base_layer()).__name__}; only "
                "linear layers can have an adapter here"
            )
        if f"{name}.weight" not in known:
            raise BadSpec(
                f"model.adapter.target_modules names {name}, whose weight is another layer's too; name others"
            )
        yield Target(
            weight=f"{name}.weight",
            a=f"{PREFIX}{name}.lora_A.weight",
            b=f"{PREFIX}{name}.lora_B.weight",
            is_transposed=isinstance(layer.get_base_layer(), Conv1D),
        )


def _write_tensors(seed: int, adapter: Lora, layout: Layout, layers: dict[str, Any], folder: Path) -> None:
    """The adapter's file: B is zero and A drawn; with FFA, A goes into a file of its own."""
    rank, drawn, zeros = adapter.largest_rank, {}, {}
    for number, (target, layer) in enumerate(zip(layout.targets, layers.values(), strict=True)):
        drawn[target.a] = draw_a(rank, layer.in_features, seed=seed, draw=0, number=number)
        zeros[target.b] = np.zeros((layer.out_features, rank), np.float32)
    with TensorFile(folder / BASE_FILE) as base:
        heads = {head_name(weight): read_values(base, weight) for weight in layout.heads}
    if adapter.merge == "ffa":
        _write(folder / FROZEN_A_FILE, drawn)
        _write(folder / MODEL_FILE, zeros | heads)
    else:
        _write(folder / MODEL_FILE, drawn | zeros | heads)


def _write(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    write_arrays(
        path, [(name, array.shape) for name, array in tensors.items()], tensors.values(), durable=True
    )


def _write_config(config: LoraConfig, path: str | None, folder: Path) -> None:
    """peft's own file, the same bytes for the same spec."""
    described: dict[str, Any] = config.to_dict()
    base = None if path is None else PurePath(path).name  # its folder is nobody's business
    content = described | {"base_model_name_or_path": base, "inference_mode": True}
    named = content["target_modules"]
    content["target_modules"] = named if isinstance(named, str) else sorted(named)
    plain = {key: getattr(value, "value", value) for key, value in content.items()}
    write_text(folder / CONFIG_FILE, json.dumps(plain, indent=2, sort_keys=True))
