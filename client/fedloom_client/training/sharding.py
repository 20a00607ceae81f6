"""A model in shards, one a rank (FSDP2): how it comes to lie so, and its way from files and to files.

Every tensor is cut along its first dimension, so that a shard is a run of bytes in a safetensors file:
ranks read their own, and rank 0 writes what it gathers a tensor at a time. Files hold whole tensors, so
that any number of ranks, sharded or not, goes on from them. Tensors that are not sharded pass unchanged.
Source: Zhao et al. 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from fedloom_client.training.group import Group
from fedloom_common.errors import TrainingFailed
from fedloom_common.tensors import TensorInfo, read_tensor

Gather = Callable[[torch.Tensor], torch.Tensor]
"""Makes a tensor whole."""


@contextmanager
def without_memory() -> Iterator[None]:
    """Build modules whose parameters have shapes and types, and no memory; buffers are as they must be."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def shard(module: nn.Module, group: Group, *, cuts_trained: bool = True) -> nn.Module:
    """Lay a module that was built ``without_memory`` over the ranks, its values arbitrary.

    Each layer is a unit of its own: it is whole on a rank only while it computes. If not ``cuts_trained``,
    what is trained lies whole on every rank all the time, as DDP wants it: adapters are small.
    Memory: a rank's share, and one layer, or all that is outside of layers, whichever is larger.

    Raises:
        TrainingFailed: the model has weights that cannot be cut, or that layers share.
    """
    mesh = init_device_mesh(group.device.type, (group.world,))
    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    begun: dict[int, nn.Parameter] = {}
    for unit in [*reversed(layers), module]:  # inner ones first
        _give_memory(unit, group.device, begun)
        whole = {part for part in unit.parameters() if part.requires_grad and not cuts_trained}
        try:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole or None)
        except (ValueError, NotImplementedError) as error:
            raise TrainingFailed(
                f"this model cannot be cut into shards: {error}; set workers.sharding: ddp at this site"
            ) from error
    if hasattr(module, "generate"):  # it calls parts of a model by themselves, such as an encoder
        register_fsdp_forward_method(module, "generate")
    module._is_fsdp_managed_module = True  # type: ignore[assignment]  # generation then keeps the ranks in step
    return module


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The rank's own part of a tensor, in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_info(info: TensorInfo, like: torch.Tensor) -> TensorInfo:
    """Where in a file the rank's own part of a tensor lies."""
    if not isinstance(like, DTensor):
        return info
    first, rows = _rows(like)
    row_bytes = info.size_bytes // max(info.shape[0], 1)
    return replace(
        info,
        shape=(rows, *info.shape[1:]),
        start_bytes=info.start_bytes + first * row_bytes,
        size_bytes=rows * row_bytes,
    )


def read_like(descriptor: int, info: TensorInfo, like: torch.Tensor) -> torch.Tensor:
    """A tensor of an open file, where and as ``like`` lies, which has its shape."""
    part = read_tensor(descriptor, local_info(info, like)).to(like.device)
    return _sharded_as(like, part) if isinstance(like, DTensor) else part


def placed_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor cut as ``like`` is, if it has its shape: an optimizer counts its steps in a scalar."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    first, rows = _rows(like)
    return _sharded_as(like, whole[first : first + rows].to(like.device))


def first_writes(
    group: Group, tensors: Mapping[str, torch.Tensor], write: Callable[[Gather], object]
) -> None:
    """Have rank 0 write tensors that lie in shards on all ranks; all call this, with the same names.

    ``write`` makes each whole by the function that it is given, once and in order.
    Memory: one whole tensor on rank 0.

    Raises:
        Cancelled, TrainingFailed: as on rank 0, on every rank.
    """
    shards = [tensor for tensor in tensors.values() if isinstance(tensor, DTensor)]
    if group.rank != 0:
        _give_all(shards)
    group.first_does(lambda: _write(shards, write))


def _write(shards: Sequence[DTensor], write: Callable[[Gather], object]) -> str:
    pending = iter(shards)

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        assert tensor is next(pending), "shards are gathered in the order that all ranks know"
        return _gathered(tensor)

    try:
        write(whole)
    finally:  # a full disk must not leave the others waiting
        _give_all(pending)
    return ""


def _give_all(shards: Sequence[DTensor] | Iterator[DTensor]) -> None:
    for tensor in shards:
        _gathered(tensor)


def _gathered(tensor: DTensor) -> torch.Tensor:
    """The whole tensor on rank 0; nothing of use on the others."""
    rows = _most_rows(tensor)
    mine = tensor.to_local().detach()
    if len(mine) < rows:
        mine = torch.cat([mine, mine.new_empty((rows - len(mine), *mine.shape[1:]))])
    if distributed.get_rank() != 0:
        distributed.gather(mine.contiguous(), dst=0)
        return mine
    world = distributed.get_world_size()
    whole = mine.new_empty((world * rows, *mine.shape[1:]))
    distributed.gather(mine.contiguous(), list(whole.chunk(world)) if rows else [mine] * world, dst=0)
    return whole[: tensor.shape[0]]


def _give_memory(unit: nn.Module, device: torch.device, begun: dict[int, nn.Parameter]) -> None:
    """Give a unit's parameters memory, tied ones once, and move its buffers."""
    given: dict[int, nn.Parameter] = {}
    replaced: dict[int, nn.Parameter] = {}  # held, so that no other object takes an id
    for part in unit.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.is_meta:
                continue
            if id(parameter) in begun:
                raise TrainingFailed(
                    f"several layers of this model share {name}, which cannot be cut into shards; set "
                    "workers.sharding: ddp at this site"
                )
            if id(parameter) not in given:
                given[id(parameter)], replaced[id(parameter)] = _with_memory(parameter, device), parameter
            setattr(part, name, given[id(parameter)])
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
    begun |= replaced


def _with_memory(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)


def _sharded_as(like: DTensor, part: torch.Tensor) -> DTensor:
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _most_rows(tensor: DTensor) -> int:
    """Rows of every shard but the last ones."""
    return -(-tensor.shape[0] // tensor.device_mesh.size())


def _rows(tensor: DTensor) -> tuple[int, int]:
    """The rank's own rows: the first, and how many."""
    rank = tensor.device_mesh.get_local_rank()
    return min(rank * _most_rows(tensor), tensor.shape[0]), tensor.to_local().shape[0]
