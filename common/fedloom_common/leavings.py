"""What an update leaves at the end that made it, for the run's next update, and that counts only if it does.

                ┌─ given up ──► gone       ┌─ did not count ──► gone
    prepared ───┴─ delivered ──► delivered ┴─ counts ─────────► kept

A folder holds one file of each at most. Every step is one rename or one removal, so that a kill between
any two leaves a state of this picture.
"""

from pathlib import Path

from fedloom_common.errors import BadTensor, WrongState
from fedloom_common.files import sync_folder
from fedloom_common.tensors import Manifest

_UPDATE_KEY, _ROUND_KEY = "fedloom.update", "fedloom.round"


class Leavings:
    """What updates of one run leave: safetensors files in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.prepared = folder / "pending.safetensors"
        """Where an update's is to be written, with the metadata that ``marks`` gives."""
        self.delivered = folder / "delivered.safetensors"
        """That of an update which has arrived; whether it counts is told with the next one."""
        self.kept = folder / "kept.safetensors"
        """What the next update is to begin from, if it is there."""

    @staticmethod
    def marks(update: str, round_: int) -> dict[str, str]:
        """Metadata of the file that an update leaves."""
        return {_UPDATE_KEY: update, _ROUND_KEY: str(round_)}

    def deliver(self, update: str) -> None:
        """An update has arrived. Doing it again changes nothing.

        Raises:
            WrongState: nothing is prepared for this update.
            BadTensor: a file is damaged.
        """
        self._move(update, self.delivered, known=(self.delivered, self.kept))

    def commit(self, update: str) -> None:
        """An update has arrived, and counts. Doing it again changes nothing.

        Raises:
            WrongState, BadTensor: as for :meth:`deliver`.
        """
        self._move(update, self.kept, known=(self.kept,))

    def discard(self, update: str) -> None:
        """An update is given up; after its delivery there is nothing to forget.

        Raises:
            BadTensor: the file is damaged.
        """
        if _update_of(self.prepared) == update:
            self.prepared.unlink(missing_ok=True)

    def settle(self, round_: int, counted_round: int | None) -> bool:
        """Keep what the last delivered update left, or let it go; then one of ``round_`` may be made.

        ``counted_round`` is the last round whose update counted, 0 if none did; None if that is not told:
        then an update of ``round_`` itself did not count, as it is made again.

        Returns whether it counts; true if nothing was delivered.

        Raises:
            BadTensor: the file is damaged, and gone.
        """
        if not self.delivered.exists():
            return True
        try:
            left_by = int(Manifest.read(self.delivered).metadata.get(_ROUND_KEY, 0))
        except BadTensor:
            self.delivered.unlink()
            raise
        counts = left_by < round_ if counted_round is None else left_by <= counted_round
        if counts:
            self.delivered.replace(self.kept)
        else:
            self.delivered.unlink()
        sync_folder(self.kept.parent)
        return counts

    def _move(self, update: str, place: Path, *, known: tuple[Path, ...]) -> None:
        if _update_of(self.prepared) == update:
            self.prepared.replace(place)
            sync_folder(place.parent)
        elif update not in map(_update_of, known):
            raise WrongState(f"nothing is prepared for update {update} in {place.parent}: make it first")


def _update_of(path: Path) -> str | None:
    return Manifest.read(path).metadata.get(_UPDATE_KEY) if path.exists() else None
