"""Error feedback: what lossy stages left out of a delivered update, added to the next one.

Source: Stich et al. 2018, arXiv:1809.07599, algorithm 1; Seide et al. 2014 (1-bit SGD).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fedloom_common.codecs.chain import Entry
from fedloom_common.codecs.storage import OutputFile
from fedloom_common.codecs.values import PIECE_VALUES, Values
from fedloom_common.errors import BadTensor
from fedloom_common.files import atomic_file
from fedloom_common.leavings import Leavings
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import Manifest, TensorInfo

_ITEM_BYTES = 4


class Feedback:
    """The residual of one run at one end, in a folder of its own; safetensors files of fp32.

    Encoding an update *prepares* the residual that it leaves; it joins a later update once ``leavings``
    says that this one counts. Until then, encoding anew starts from the same residual, so a retry applies
    nothing twice, and an update that is given up leaves no trace.
    """

    def __init__(self, folder: Path, update: str, round_: int = 0) -> None:
        """``update`` names the update at hand, and ``round_`` its round."""
        self.leavings = Leavings(folder)
        self._update = update
        self._marks = Leavings.marks(update, round_)

    @contextmanager
    def prepare(self, coded: list[TensorInfo]) -> Iterator["Residual"]:
        """The residual to add, and to replace, while ``coded`` tensors are encoded in this order.

        Raises:
            BadTensor: the residual belongs to another model.
        """
        entries = [Entry(info.name, "F32", info.shape) for info in coded]
        with atomic_file(self.leavings.prepared) as file:
            out = OutputFile(file, entries, self._marks)
            if not self.leavings.kept.exists():
                yield Residual(None, out)
            else:
                with TensorFile(self.leavings.kept) as kept:
                    self._require_same(kept.manifest, out)
                    yield Residual(kept, out)
            out.finish()

    def commit(self) -> None:
        """Let the prepared residual count. Doing it again changes nothing.

        Raises:
            WrongState: none was prepared for this update.
        """
        self.leavings.commit(self._update)

    def _require_same(self, kept: Manifest, out: OutputFile) -> None:
        wanted = Manifest(tensors=tuple(out.infos.values()), metadata={}, size_bytes=0)
        try:
            wanted.require_same_tensors(kept)
        except BadTensor as error:
            raise BadTensor(
                f"the residual {self.leavings.kept} is another model's or codec's: {error}; remove it"
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
