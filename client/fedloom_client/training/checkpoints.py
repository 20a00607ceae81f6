"""A training under way, on disk: ranks that were killed go on from there and not from the round's start."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from fedloom_client.training.group import Group
from fedloom_client.training.models import LocalModel
from fedloom_client.training.optimizers import load_state, state_tensors
from fedloom_client.training.orders import CHECKPOINT
from fedloom_client.training.sharding import Gather, first_writes
from fedloom_common.errors import BadTensor, StorageFull, TrainingFailed
from fedloom_common.tensors import Manifest, read_tensors, write_tensors

_MODEL, _OPTIMIZER, _LOSSES = "model/", "optimizer/", "losses"

logger = logging.getLogger(__name__)


class Checkpoint:
    """The one local checkpoint of a run: model, optimizer and losses after some steps of an order.

    Generators are not part of it. Instead every rank is seeded anew where a checkpoint is due, from run,
    round, rank and step: a training that goes on from there ends with the bytes of one that never stopped.
    With another number of ranks it goes on too, and rounding and dropout make the difference.
    """

    def __init__(
        self, folder: Path, order_id: str, every: int | None, group: Group, seed: Callable[[int], None]
    ) -> None:
        """``every`` is a number of steps, None for no checkpoints; ``seed`` seeds this rank for a step."""
        self._path = folder / CHECKPOINT
        self._every, self._group, self._seed = every, group, seed
        self._marks = {"order": order_id}

    def begin(self, model: LocalModel, optimizer: torch.optim.Optimizer) -> list[float]:
        """Take up what an earlier start of the order left; the losses of the steps that it had taken."""
        self._model, self._optimizer = model, optimizer
        losses = self._load() if self._group.first_does(self._look) else []
        self._seed(len(losses))
        return losses

    def is_due(self, steps: int) -> bool:
        """Whether to save after so many steps of the round."""
        return self._every is not None and steps % self._every == 0

    def save(self, losses: list[float]) -> None:
        """Write how things stand after the steps with these losses; the other ranks wait for rank 0.

        A full disk costs the checkpoint, not the training.
        """
        tensors = self._tensors(losses)
        first_writes(self._group, tensors, lambda whole: self._write(tensors, len(losses), whole))
        self._seed(len(losses))

    def _look(self) -> str:
        """Whether there is a checkpoint of this order; any other is of no more use."""
        if not self._path.exists():
            return ""
        try:
            marks = Manifest.read(self._path).metadata
        except BadTensor as error:
            logger.warning("the local checkpoint is damaged", extra={"error": str(error)})
            marks = {}
        if self._every is not None and marks.items() >= self._marks.items():
            return "found"
        self._path.unlink()
        return ""

    def _load(self) -> list[float]:
        losses: list[float] = []
        state: list[tuple[str, torch.Tensor]] = []
        try:
            for name, tensor in read_tensors(self._path):
                if name.startswith(_MODEL):
                    self._model.fill(name.removeprefix(_MODEL), tensor)
                elif name.startswith(_OPTIMIZER):
                    state.append((name.removeprefix(_OPTIMIZER), tensor))
                elif name == _LOSSES:
                    losses = tensor.tolist()
            load_state(self._optimizer, self._model.module, state)
        except (BadTensor, KeyError) as error:
            raise TrainingFailed(
                f"the local checkpoint {self._path} cannot be used ({error}): delete it to begin anew"
            ) from error
        return losses

    def _tensors(self, losses: list[float]) -> dict[str, torch.Tensor]:
        tensors = {_LOSSES: torch.tensor(losses, dtype=torch.float64)}
        tensors |= {_MODEL + name: tensor for name, tensor in self._model.tensors.items()}
        state = state_tensors(self._optimizer, self._model.module)
        tensors |= {_OPTIMIZER + name: tensor for name, tensor in state.items()}
        return tensors

    def _write(self, tensors: dict[str, torch.Tensor], steps: int, whole: Gather) -> None:
        try:
            write_tensors(self._path, tensors, self._marks, whole=whole)
        except (OSError, StorageFull) as error:
            logger.warning("no local checkpoint", extra={"step": steps, "error": str(error)})
