"""The model on one rank: built from its config, filled from the global model's file, written as an update."""

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from fedloom_client.training.group import Group
from fedloom_client.training.orders import SPARE_UPDATE
from fedloom_client.training.sharding import first_writes, local, local_info, placed_like, without_memory
from fedloom_client.training.tasks import refuse_remote_code
from fedloom_common.controls import without_controls
from fedloom_common.errors import BadTensor, TrainingFailed
from fedloom_common.tensors import (
    Manifest,
    TensorInfo,
    read_into,
    read_tensor,
    tensor_bytes,
    torch_dtype,
    write_tensors,
)


class LocalModel:
    """A rank's copy of the model, in the types of the global model's file.

    Memory: the model; loading adds one tensor, and only where it must be moved to a device.
    """

    def __init__(
        self,
        assets: Path,
        global_model: Path,
        device: torch.device,
        model_class: str = "AutoModelForCausalLM",
        lay: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        """Build the model with a class of transformers; its values are arbitrary until ``load``.

        ``lay`` gives a module without memory its place on the rank; all of it on the device if not given.

        Raises:
            TrainingFailed: the config asks for code, or for a model that transformers does not have.
            BadTensor: the file's tensors are not this model's.
        """
        self.manifest = Manifest.read(global_model)
        own = without_controls(self.manifest)
        with torch.device("meta"):  # a config that asks for more than the file holds must not cost memory
            file_tensors(build_module(assets, torch.float32, model_class), own)
        with without_memory() if lay else nullcontext():
            module = build_module(assets, _main_dtype(own), model_class)
        _match_dtypes(module, own)
        self.module = lay(module) if lay else module.to(device)
        self.tensors = file_tensors(self.module, own)
        """The values by their names in the global model's file."""

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What training changes, by its names in the file."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        }

    def load(self, global_model: Path) -> None:
        """Take over the values of a global model, in place.

        Every rank reads the file itself: on one host it comes from the page cache, which is cheaper
        than a broadcast through sockets, and several hosts share the file system anyway.

        Raises:
            BadTensor: the file has other tensors than the run's first model.
        """
        manifest = Manifest.read(global_model)
        self.manifest.require_same_tensors(manifest)
        with global_model.open("rb", buffering=0) as file, torch.no_grad():
            for info in without_controls(manifest).tensors:
                _fill(self.tensors[info.name], file.fileno(), info)

    def fold(self, folds: tuple[str, ...]) -> None:
        """Nothing: a model that is trained whole has no frozen weights to fold changes into."""
        assert not folds, "only adapters have folds"

    def fill(self, name: str, values: torch.Tensor) -> None:
        """Take over the values of one tensor.

        Raises:
            KeyError, BadTensor: the model has none of that name, or of another shape.
        """
        tensor = self.tensors[name]
        if tensor.shape != values.shape:
            raise BadTensor(f"tensor {name} has shape {list(values.shape)}, wanted {list(tensor.shape)}")
        with torch.no_grad():
            tensor.copy_(placed_like(values, tensor))

    def write(self, path: Path, besides: Mapping[str, torch.Tensor], group: Group) -> None:
        """Write the values, and those that travel ``besides``, as an update; every rank gives its part.

        Raises:
            TrainingFailed: there is no room.
        """
        tensors, spare = {**self.tensors, **besides}, path.with_name(SPARE_UPDATE)
        first_writes(
            group,
            tensors,
            lambda whole: write_tensors(path, tensors, durable=False, over=spare, whole=whole),
        )


def build_module(assets: Path, dtype: torch.dtype, model_class: str) -> nn.Module:
    """The model of a config, with arbitrary values.

    Raises:
        TrainingFailed: the config asks for code, or for a model that transformers does not have.
    """
    refuse_remote_code(assets)
    try:
        config = AutoConfig.from_pretrained(str(assets), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TrainingFailed(f"the model's config.json does not load: {error}") from error
    auto = getattr(transformers, model_class, None)
    if auto is None or type(config) not in auto._model_mapping:
        raise TrainingFailed(f"transformers has no {model_class} of model_type {config.model_type}")
    module: nn.Module = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    return module


def _main_dtype(manifest: Manifest) -> torch.dtype:
    sizes: dict[str, int] = {}
    for info in manifest.tensors:
        if info.is_float:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.size_bytes
    if not sizes:
        raise BadTensor("the global model has no tensor of a floating-point type: nothing can be trained")
    return torch_dtype(max(sizes, key=lambda name: sizes[name]))


def _match_dtypes(module: nn.Module, manifest: Manifest) -> None:
    wanted = {info.name: torch_dtype(info.dtype) for info in manifest.tensors}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.dtype != wanted.get(name, tensor.dtype):
            tensor.data = tensor.data.to(wanted[name])


def file_tensors(
    module: nn.Module, manifest: Manifest, besides: Collection[str] = ()
) -> Mapping[str, torch.Tensor]:
    """The model's tensors by their names in the file, where tied weights have one name of several.

    Raises:
        BadTensor: one is missing on either side, or has another shape; those named ``besides`` may.
    """
    state: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    missing = {id(tensor): name for name, tensor in reversed(state.items()) if name not in besides}
    tensors = {}
    for info in manifest.tensors:
        if info.name in besides:
            continue
        tensor = state.get(info.name)
        if tensor is None:
            raise BadTensor(f"tensor {info.name} of the global model is not in the model of its config.json")
        if tuple(tensor.shape) != info.shape:
            raise BadTensor(
                f"tensor {info.name} has shape {list(info.shape)} in the global model, and "
                f"{list(tensor.shape)} in the model of its config.json"
            )
        if missing.pop(id(tensor), None) is None:
            raise BadTensor(f"tensor {info.name} is in the global model twice: tied weights have one name")
        tensors[info.name] = tensor
    if missing:
        raise BadTensor(f"tensor {min(missing.values())} of the model is not in the global model")
    return tensors


def _fill(tensor: torch.Tensor, descriptor: int, info: TensorInfo) -> None:
    tensor, info = local(tensor), local_info(info, tensor)
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        read_into(descriptor, memoryview(tensor_bytes(tensor)), info.start_bytes)
    else:
        tensor.copy_(read_tensor(descriptor, info))
