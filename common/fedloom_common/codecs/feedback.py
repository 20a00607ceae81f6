"""Error feedback: what lossy stages left out of a delivered update, added to the next one.

Source: Stich et al. 2018, arXiv:1809.07599, algorithm 1; Seide et al. 2014 (1-bit SGD).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fedloom_common.codecs.chain import Entry
from fedloom_common.codecs.storage import OutputFile, TensorFile
from fedloom_common.codecs.values import PIECE_VALUES, Values
from fedloom_common.errors import BadTensor, WrongState
from fedloom_common.files import atomic_file, sync_folder
from fedloom_common.tensors import Manifest, TensorInfo

UPDATE_KEY = "fedloom.update"
_ITEM_BYTES = 4


class Feedback:
    """The residual of one run at one site, in a folder of its own; two safetensors files of fp32.

    Encoding an update *prepares* the residual that it leaves; only :meth:`commit`, once the
    update is delivered, lets it count. Until then, encoding anew starts from the same residual,
    so a retry applies nothing twice, and an update that is given up leaves no trace.
    """

    def __init__(self, folder: Path, update: str) -> None:
        """``update`` names the update at hand: the assignment's id."""
        self._update = update
        self._kept = folder / "residual.safetensors"
        self._pending = folder / "pending.safetensors"

    @contextmanager
    def prepare(self, coded: list[TensorInfo]) -> Iterator["Residual"]:
        """The residual to add, and to replace, while ``coded`` tensors are encoded in this order.

        Raises:
            BadTensor: the residual belongs to another model.
        """
        entries = [Entry(info.name, "F32", info.shape) for info in coded]
        with atomic_file(self._pending) as file:
            out = OutputFile(file, entries, {UPDATE_KEY: self._update})
            if not self._kept.exists():
                yield Residual(None, out)
            else:
                with TensorFile(self._kept) as kept:
                    self._require_same(kept.manifest, out)
                    yield Residual(kept, out)
            out.finish()

    def commit(self) -> None:
        """Let the prepared residual count: its update was delivered. Doing it again changes nothing.

        Raises:
            WrongState: none was prepared for this update.
        """
        if _update_of(self._pending) == self._update:
            self._pending.replace(self._kept)
            sync_folder(self._kept.parent)
        elif _update_of(self._kept) != self._update:
            raise WrongState(f"no residual is prepared for update {self._update}: encode it first")

    def discard(self) -> None:
        """Forget the prepared residual, if it is this update's: it will not be delivered."""
        if _update_of(self._pending) == self._update:
            self._pending.unlink(missing_ok=True)

    def _require_same(self, kept: Manifest, out: OutputFile) -> None:
        wanted = Manifest(tensors=tuple(out.infos.values()), metadata={}, size_bytes=0)
        try:
            wanted.require_same_tensors(kept)
        except BadTensor as error:
            raise BadTensor(
                f"the residual {self._kept} is another model's or codec's: {error}; remove it to start anew"
            ) from error


class Residual:
    """What was left out until now, and what will be after this update."""

    def __init__(self, kept: TensorFile | None, out: OutputFile) -> None:
        self._kept, self._out = kept, out

    def read(self, info: TensorInfo, piece: int, values: Values) -> None:
        """Fill ``values`` with a piece of what was left out: zeros at first."""
        if self._kept is None:
            values.fill(0)
        else:
            place = piece * PIECE_VALUES * _ITEM_BYTES
            self._kept.read(info.name, place, values.view(np.uint8).data)

    def write(self, info: TensorInfo, piece: int, values: Values) -> None:
        """Keep a piece for the next update."""
        place = piece * PIECE_VALUES * _ITEM_BYTES
        self._out.write(info.name, place, values.view(np.uint8).data)


def _update_of(path: Path) -> str | None:
    return Manifest.read(path).metadata.get(UPDATE_KEY) if path.exists() else None
