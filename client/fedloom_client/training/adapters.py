"""The model on one rank where an adapter is trained: frozen weights, and small matrices by peft upon them."""

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from fedloom_client.training.models import LocalModel, build_module, file_tensors
from fedloom_client.training.orders import Order
from fedloom_client.training.quantised import QUANTISED, quantise, require_quantisation
from fedloom_client.training.sharding import placed_like, without_memory
from fedloom_common.adapters.folds import Folds
from fedloom_common.adapters.layout import (
    BASE_FILE,
    CONFIG_FILE,
    FROZEN_A_FILE,
    LAYOUT_FILE,
    PREFIX,
    Layout,
    read_values,
)
from fedloom_common.controls import without_controls
from fedloom_common.errors import BadTensor, TrainingFailed
from fedloom_common.runspec import Lora
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import Manifest, read_tensors

ADAPTER = "default"
"""peft's name for the one adapter in a model; files leave it out."""


class AdapterModel(LocalModel):
    """A rank's copy of the frozen model, and the adapter in the types of the global model's file.

    Memory: the frozen model in ``base_precision``, or this rank's share of it; the adapter in fp32, and one
    weight in fp32 while the base is filled or folded into.
    """

    def __init__(
        self,
        adapter: Lora,
        model_class: str,
        order: Order,
        device: torch.device,
        lay: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        """Build the model; the adapter's values are arbitrary until ``load``, the base's until ``fold``.

        ``lay`` gives a module without memory its place on the rank; all of it on the device if not given,
        or if the base has few bits, which cannot be cut.

        Raises:
            TrainingFailed: the config asks for what this site does not have, or cannot do.
            BadTensor: the files' tensors are not this model's.
        """
        assets = Path(order.assets_dir)
        require_quantisation(adapter.base_precision, device)
        self._base = Path(order.frozen[BASE_FILE])
        self._layout = Layout.read(assets / LAYOUT_FILE)
        lay = None if adapter.base_precision in QUANTISED else lay
        dtype = torch.float32 if adapter.base_precision == "fp32" else torch.bfloat16
        self._takes_folds = dtype is torch.float32 and lay is None
        self.manifest = Manifest.read(Path(order.model_path))
        self._own = without_controls(self.manifest)
        base = Manifest.read(self._base)
        with torch.device("meta"):  # a config that asks for more than the file holds must not cost memory
            file_tensors(build_module(assets, torch.float32, model_class), base)
        with without_memory() if lay else nullcontext():
            module = build_module(assets, dtype, model_class)
        self._quantised = quantise(module, adapter.base_precision, device, besides=self._layout.heads)
        self.module = module if lay else module.to(device)
        self._quantised.prepare()
        self._weights = file_tensors(self.module, base, besides=self._quantised.names)
        _inject(self.module, assets, self._rank(), self._layout.heads)
        if lay:
            self._lay(lay)
        self.tensors = self._adapter_tensors()
        self._freeze_a(order)
        self._folds: tuple[str, ...] | None = None
        """What is folded into the weights; None while they are arbitrary."""

    def fold(self, folds: tuple[str, ...]) -> None:
        """Have the base's weights with these changes in them, and no others.

        Whole weights in fp32 take only what is new. Others were rounded, or no rank has them: they are made
        anew from the base.

        Raises:
            BadTensor: a file does not fit the base.
        """
        if folds == self._folds:
            return
        known, self._folds = self._folds, None
        if known is None:
            self._fill([info.name for info in Manifest.read(self._base).tensors], folds)
        elif self._takes_folds and folds[: len(known)] == known:
            self._add(folds[len(known) :])
        else:
            self._fill([target.weight for target in self._layout.targets], folds)
        self._folds = folds

    def _lay(self, lay: Callable[[nn.Module], nn.Module]) -> None:
        """Give the module its place on the rank, where other tensors hold its weights."""
        places = {id(tensor): place for place, tensor in self.module.state_dict(keep_vars=True).items()}
        self.module = lay(self.module)
        laid = self.module.state_dict(keep_vars=True)
        self._weights = {name: laid[places[id(tensor)]] for name, tensor in self._weights.items()}

    def _fill(self, names: list[str], folds: tuple[str, ...]) -> None:
        """Take weights from the base, and fold."""
        targets = {target.weight for target in self._layout.targets}
        with TensorFile(self._base) as base, Folds([Path(path) for path in folds]) as opened:
            for name in names:
                if not base.manifest[name].is_float:
                    continue
                weight = read_values(base, name)
                if name in targets:
                    opened.apply(name, weight)
                self._put(name, torch.from_numpy(weight))
        others = {info.name for info in Manifest.read(self._base).tensors if not info.is_float}
        for name, values in read_tensors(self._base) if others.intersection(names) else ():
            if name in others:
                self._put(name, values)

    def _add(self, folds: tuple[str, ...]) -> None:
        """Fold into weights that are there, whole and in fp32."""
        with Folds([Path(path) for path in folds]) as opened:
            for name in opened.weights:
                weight = self._weights[name].detach().to("cpu", copy=True).numpy()
                opened.apply(name, weight)
                self._put(name, torch.from_numpy(weight))

    def _put(self, name: str, values: torch.Tensor) -> None:
        if name in self._quantised.names:
            self._quantised.put(name, values)
        else:
            with torch.no_grad():
                self._weights[name].copy_(placed_like(values, self._weights[name]))

    def _rank(self) -> int:
        b = self._layout.targets[0].b
        try:
            return self.manifest[b].shape[1]
        except (KeyError, IndexError) as error:
            raise BadTensor(f"the global adapter has no matrix {b}") from error

    def _adapter_tensors(self) -> dict[str, torch.Tensor]:
        """What travels, by its names in the file."""
        known = {_file_name(name): tensor for name, tensor in self.module.named_parameters()}
        tensors: dict[str, torch.Tensor] = {}
        for info in self._own.tensors:
            tensor = known.get(info.name)
            if tensor is None or tuple(tensor.shape) != info.shape:
                raise BadTensor(f"tensor {info.name} of the global adapter is not in the model of its config")
            tensors[info.name] = tensor
        return tensors

    def _freeze_a(self, order: Order) -> None:
        """Take over the half that is not trained, if there is one in a file of its own."""
        path = order.frozen.get(FROZEN_A_FILE)
        known = {_file_name(name): tensor for name, tensor in self.module.named_parameters()}
        for name, values in read_tensors(Path(path)) if path else ():
            tensor = known.get(name)
            if tensor is None or tensor.shape != values.shape:
                raise BadTensor(f"tensor {name} of the adapter's frozen half is not in the model")
            tensor.requires_grad_(False)
            with torch.no_grad():
                tensor.copy_(values)


def _inject(module: nn.Module, assets: Path, rank: int, heads: Sequence[str]) -> None:
    """Put peft's layers in place; what is trained is fp32, whatever the base's type is.

    Heads are trained where they are: peft would keep a second copy of each.
    """
    try:
        settings: dict[str, Any] = json.loads((assets / CONFIG_FILE).read_text())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that another version of peft does not know
            config = LoraConfig.from_peft_type(
                **settings | {"r": rank, "inference_mode": False, "modules_to_save": None}
            )
            inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrainingFailed(f"peft cannot build the adapter of {CONFIG_FILE}: {error}") from error
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in heads)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in {head.rpartition(".")[0] for head in heads}:  # peft's own layers do it themselves
        module.get_submodule(layer).register_forward_pre_hook(_in_fp32)


def _in_fp32(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What layers of a smaller type tell one of fp32."""
    return tuple(values.float() for values in inputs)


def _file_name(name: str) -> str:
    """A parameter's name as peft writes it into files."""
    return PREFIX + name.replace(f".{ADAPTER}.", ".")
