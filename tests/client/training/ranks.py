"""A rank of a test: does the jobs of a list, each in a trainer of its own, as after a restart, or warm.

    python ranks.py RANK WORLD LIST DEVICE

LIST is a JSON file, a folder beside it the meeting point; each rank writes what came of a job there.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from fedloom_client.training.group import Group
from fedloom_client.training.orders import Job
from fedloom_client.training.processes import leave_at_once
from fedloom_client.training.service import WarmRank
from fedloom_client.training.sharding import local


class Killed(BaseException):
    """Every rank ends here."""


def main() -> None:
    rank, world, jobs = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = distributed.FileStore(str(jobs.with_suffix(".store")), world)
    device = torch.device("cuda", rank) if sys.argv[4] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=distributed.PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    group = Group(rank, world, device, store)
    results, warm = {}, WarmRank(group)
    for name, entry in json.loads(jobs.read_text()).items():
        warm = warm if entry["is_warm"] else WarmRank(group)
        results[name] = perform(warm, Job.from_json(json.dumps(entry["job"])), entry["cut_after"])
    jobs.with_suffix(f".{rank}").write_text(json.dumps(results))
    group.leave()
    leave_at_once()


def perform(warm: WarmRank, job: Job, cut_after: int | None) -> dict[str, Any]:
    real, taken = torch.optim.Optimizer.zero_grad, 0

    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        nonlocal taken
        taken += 1
        if cut_after is not None and taken > cut_after:
            raise Killed
        real(self, set_to_none)

    torch.optim.Optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
    try:
        metrics = warm.perform(job).metrics
    except Killed:
        return {}
    finally:
        torch.optim.Optimizer.zero_grad = real  # type: ignore[method-assign]
    return metrics | {"held_bytes": held_bytes(warm), "finds_unused": finds_unused(warm)}


def held_bytes(warm: WarmRank) -> int:
    """Bytes of this rank's parameters and optimizer state."""
    trainer = warm._trainer
    assert trainer is not None
    tensors = list(trainer._model.module.parameters())
    if trainer._optimizer is not None:
        tensors += [value for state in trainer._optimizer.state.values() for value in state.values()]
    return sum(local(tensor).nbytes for tensor in tensors)


def finds_unused(warm: WarmRank) -> bool | None:
    """Whether DDP looks for weights without gradient; None if it was not made."""
    trainer = warm._trainer
    assert trainer is not None
    loss = vars(trainer).get("_loss")
    return getattr(loss, "find_unused_parameters", None)


if __name__ == "__main__":
    main()
