"""The ranks of a worker group, and all that passes between them."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from fedloom_client.training import launcher
from fedloom_client.training.orders import Cancelled
from fedloom_common.errors import FederationError, TrainingFailed

IDLE = timedelta(days=365)  # between rounds a rank waits for as long as other sites train


@dataclass
class Group:
    """This process's place among the ranks. Rank 0 is always one on the daemon's host."""

    rank: int
    world: int
    device: torch.device
    store: distributed.Store | None  # type: ignore[name-defined]
    """None if there is only one rank."""

    _said: int = 0
    _heard_by_all: int = 0
    _kept_from: int = 0

    def share(self, text: str = "") -> str:
        """Rank 0's text, on every rank; waits for it without a time limit and without polling.

        Through the store, because a collective's timeout is short and broadcast_object_list unpickles.
        """
        key, self._said = f"said/{self._said}", self._said + 1
        if self.store is None:
            return text
        if self.rank != 0:
            self.store.wait([key], IDLE)
            return str(self.store.get(key).decode())
        self.store.set(key, text)
        for old in range(self._kept_from, self._heard_by_all):
            self.store.delete_key(f"said/{old}")
        self._kept_from = self._heard_by_all
        return text

    def first_does(self, action: Callable[[], str]) -> str:
        """What ``action`` returns on rank 0, on every rank; the others wait meanwhile.

        Raises:
            Cancelled, TrainingFailed: as it did on rank 0, so that the ranks stay in step.
        """
        outcome = json.dumps(_outcome(action)) if self.rank == 0 else ""
        kind, text = json.loads(self.share(outcome))
        if kind == "cancelled":
            raise Cancelled
        if kind == "failed":
            raise TrainingFailed(text)
        return str(text)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' values, in place, on every rank."""
        if self.world > 1:
            distributed.all_reduce(values)
        self._heard_by_all = self._said  # nobody is here who has not read what was said before
        return values

    def leave(self) -> None:
        """End together: the store lives in one of the ranks, and the others still read from it."""
        if self.world > 1:
            self.sum(torch.zeros(1, device=self.device))
            distributed.destroy_process_group()


def join(listener: socket.socket | None) -> Group:
    """Meet the other ranks; every start of the group has a store of its own."""
    device = _device()
    launched_as, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1:
        return Group(0, 1, device, None)
    timeout = timedelta(seconds=float(os.environ[launcher.COLLECTIVE_TIMEOUT_S]))
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=listener is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    if launcher.SOCKET in os.environ and os.environ["LOCAL_RANK"] == "0":
        store.set("first", str(launched_as))
    # torchrun numbers hosts by their addresses: count from the rank that the daemon talks to instead
    rank = (launched_as - int(store.get("first"))) % world
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=distributed.PrefixStore("group", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    return Group(rank, world, device, store)


def _device() -> torch.device:
    if os.environ[launcher.DEVICE] == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _outcome(action: Callable[[], str]) -> tuple[str, str]:
    try:
        return "done", action()
    except Cancelled:
        return "cancelled", ""
    except (FederationError, OSError) as error:
        return "failed", str(error)
