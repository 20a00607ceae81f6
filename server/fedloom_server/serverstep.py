"""The server optimizer's step on files: of a model, a round's centre and a state the next model and state.

The state is a safetensors file of fp32 tensors, SLOT/NAME for tensor NAME of the model. It lies in the
store under its digest, which the round's row names in the transaction that names the round's model: a
coordinator that was killed finds a model and the state that belongs to it, or neither of both.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.spec import AS_IS
from fedloom_common.controls import is_control
from fedloom_common.errors import BadTensor
from fedloom_common.files import atomic_file, flushing
from fedloom_common.floats import decode
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import ITEM_BYTES, Manifest
from fedloom_server.aggregation.output import NextModel, Raw, TensorPlaces, Values
from fedloom_server.aggregation.pieces import PIECE_VALUES, Piece, each_piece
from fedloom_server.optimizers import ServerOptimizer

OPTIMIZER_KEY = "fedloom.optimizer"
STEPS_KEY = "fedloom.steps"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: the formula, its rate, and what it is applied to."""

    optimizer: ServerOptimizer
    rate: float
    base: Path
    """The present model."""
    centre: Path
    """What the round's updates come to."""
    state: Path | None
    """What the round before left; None before the first."""

    @property
    def number(self) -> int:
        """Which step of the state it is, from 1."""
        before = {} if self.state is None else Manifest.read(self.state).metadata
        return 1 + int(before.get(STEPS_KEY, 0))


def take_step(step: Step, model: Path, state: Path) -> None:
    """Write the next model and the next state, each whole and durable.

    Tensors that are no floats, and control variates, are the centre's.

    Memory: about 7 MiB for each of a few threads, whatever the size of the model.

    Raises:
        BadTensor: the next model or state is not finite.
    """
    manifest, number = Manifest.read(step.base), step.number
    infos = [info for info in manifest.tensors if _is_stepped(info.name, info.is_float)]
    slots = [
        (_slot_of(slot, info.name), "F32", info.shape) for slot in step.optimizer.slots for info in infos
    ]
    entries = [(info.name, info.dtype, info.shape) for info in manifest.tensors]
    with (
        atomic_file(model) as model_file,
        atomic_file(state) as state_file,
        flushing(model_file.fileno()),
        flushing(state_file.fileno()),
    ):
        models = TensorPlaces(model_file.fileno(), entries, manifest.metadata)
        told = {OPTIMIZER_KEY: step.optimizer.name, STEPS_KEY: str(number)}
        states = TensorPlaces(state_file.fileno(), slots, told)

        def make(stack: ExitStack) -> Callable[[Piece], None]:
            return models.writing(_Stepper(step, number, states, stack).bytes_of)

        each_piece(manifest.tensors, make)


class _Stepper:
    """Makes a piece of the next model at a time, and writes that of the state; for one thread."""

    def __init__(self, step: Step, number: int, states: TensorPlaces, stack: ExitStack) -> None:
        self._step, self._number, self._states = step, number, states
        self._base = stack.enter_context(TensorFile(step.base))
        self._centre = stack.enter_context(TensorFile(step.centre))
        self._before = stack.enter_context(TensorFile(step.state)) if step.state else None
        chain = Chain(AS_IS)
        self._next, self._carried = NextModel(chain, self._base), NextModel(chain, self._centre)
        self._values = [np.empty(PIECE_VALUES) for _ in range(2 + len(step.optimizer.slots))]
        self._floats = np.empty(PIECE_VALUES, np.float32)

    def bytes_of(self, piece: Piece) -> Raw:
        if not _is_stepped(piece.info.name, piece.info.is_float):
            return self._carried.carried(piece)
        base, gradient, *state = (values[: piece.count] for values in self._values)
        self._next.present(piece, base)
        self._carried.present(piece, gradient)
        np.subtract(base, gradient, out=gradient)
        for (slot, begin), values in zip(self._step.optimizer.slots.items(), state, strict=True):
            self._read(slot, begin, piece, values)
        with np.errstate(over="ignore", invalid="ignore"):  # told when they are rounded
            base -= self._step.optimizer.step(gradient, state, self._step.rate, self._number)
            for slot, values in zip(self._step.optimizer.slots, state, strict=True):
                self._write(slot, piece, values)
        return self._next.rounded(piece, base)

    def _read(self, slot: str, begin: float, piece: Piece, values: Values) -> None:
        if self._before is None:
            values.fill(begin)
            return
        floats = self._floats[: piece.count]
        place = piece.start * ITEM_BYTES["F32"]
        self._before.read(_slot_of(slot, piece.info.name), place, floats.view(np.uint8).data)
        decode(floats.view(np.uint8), "F32", values)

    def _write(self, slot: str, piece: Piece, values: Values) -> None:
        floats = self._floats[: piece.count]
        floats[:] = values
        if not np.isfinite(floats).all():
            raise BadTensor(
                f"{self._step.optimizer.name}'s {slot} of tensor {piece.info.name} leaves the range of fp32: "
                "the round's updates are too far from its model"
            )
        place = piece.start * ITEM_BYTES["F32"]
        self._states.write(_slot_of(slot, piece.info.name), place, floats.view(np.uint8))


def _is_stepped(name: str, is_float: bool) -> bool:
    return is_float and not is_control(name)


def _slot_of(slot: str, name: str) -> str:
    return f"{slot}/{name}"
