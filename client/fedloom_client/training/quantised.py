"""Frozen weights in 8 or 4 bits, by bitsandbytes on CUDA devices."""

from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fedloom_common.errors import TrainingFailed
from fedloom_common.runspec.adapter import Precision

QUANTISED: tuple[Precision, ...] = ("int8", "nf4")


class QuantisedWeights:
    """The weights of a model that are held in few bits; there may be none."""

    def __init__(self, layers: dict[str, Any], precision: Precision, device: torch.device) -> None:
        self._layers, self._precision, self._device = layers, precision, device
        self.names = frozenset(layers)
        """Names of the weights."""

    def prepare(self) -> None:
        """Make the weights those of bitsandbytes, still without values: peft looks at type and device."""
        for layer in self._layers.values():
            layer.weight = self._weight(torch.empty(0, device=self._device))

    def put(self, name: str, values: torch.Tensor) -> None:
        """Take over a weight's values, rounded to what its bits can tell."""
        half = values.to(torch.bfloat16 if self._precision == "nf4" else torch.float16)
        self._layers[name].weight = self._weight(half).to(self._device)  # the move is what rounds

    def _weight(self, values: torch.Tensor) -> nn.Parameter:
        import bitsandbytes as bnb

        weight: nn.Parameter
        if self._precision == "nf4":
            weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
        else:
            weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
        return weight


def require_quantisation(precision: Precision, device: torch.device) -> None:
    """Check that this site can hold frozen weights so.

    Raises:
        TrainingFailed: it has no CUDA device, or no bitsandbytes.
    """
    if precision not in QUANTISED:
        return
    if device.type != "cuda":
        raise TrainingFailed(
            f"model.adapter.base_precision is {precision}, which needs a CUDA device, and this site trains "
            "on the CPU: take fp32 or bf16, or leave this site out of the cohort"
        )
    if find_spec("bitsandbytes") is None:
        raise TrainingFailed(
            f"model.adapter.base_precision is {precision}, which needs the package bitsandbytes, and this "
            "site does not have it: pip install bitsandbytes there, or take fp32 or bf16"
        )


def quantise(
    module: nn.Module, precision: Precision, device: torch.device, besides: Collection[str] = ()
) -> QuantisedWeights:
    """Replace a model's linear layers by layers of few bits without values, but not the output's.

    Nor those whose weights are named ``besides``: they are trained.
    """
    layers: dict[str, Any] = {}
    if precision in QUANTISED:
        output = module.get_output_embeddings()  # type: ignore[operator]
        found = [(name, layer) for name, layer in module.named_modules() if type(layer) is nn.Linear]
        for name, layer in found:
            if layer is not output and f"{name}.weight" not in besides:
                layers[f"{name}.weight"] = _replace(module, name, layer, precision)
    return QuantisedWeights(layers, precision, device)


def _replace(module: nn.Module, name: str, layer: nn.Linear, precision: Precision) -> nn.Module:
    import bitsandbytes as bnb

    shape, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
    if precision == "nf4":
        new = bnb.nn.Linear4bit(*shape, bias=has_bias, compute_dtype=torch.bfloat16, quant_type="nf4")
    else:
        new = bnb.nn.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False)
    new.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # values would cost the model once more
    if has_bias:
        new.bias = layer.bias
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, new)
    quantised: nn.Module = new
    return quantised
