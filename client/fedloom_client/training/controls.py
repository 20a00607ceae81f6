"""A site's own control variates cₖ (SCAFFOLD), in the run's folder.

A training *prepares* them; they count once its update is delivered, as the server's c counts them from
then on. The daemon says so, so torch may not enter this room.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom_client.training.orders import Order
from fedloom_common.files import sync_folder
from fedloom_common.tensors import Manifest, write_tensors

if TYPE_CHECKING:
    import torch

    from fedloom_client.training.group import Group

FOLDER = "control"
UPDATE_KEY, ROUND_KEY = "fedloom.update", "fedloom.round"


class SiteControls:
    """The control variates of one run, by the round that left them.

    Those of two rounds stay: a round that is tried again begins from those before it.
    """

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / FOLDER
        self._pending = self._folder / "pending.safetensors"

    def before(self, round_: int) -> Path | None:
        """The file that counted before a round; None at the site's first."""
        rounds = [number for number in self._rounds() if number < round_]
        return self._file(max(rounds)) if rounds else None

    def prepare(self, controls: Mapping[str, "torch.Tensor"], order: Order, group: "Group") -> None:
        """Write the control variates that go with the update of an order; every rank gives its part.

        Raises:
            TrainingFailed: there is no room.
        """
        from fedloom_client.training.sharding import first_writes

        facts = {UPDATE_KEY: order.id, ROUND_KEY: str(order.round)}
        first_writes(
            group, controls, lambda whole: write_tensors(self._pending, controls, facts, whole=whole)
        )

    def commit(self, update: str) -> None:
        """Let count what was prepared with a delivered update. Doing it again changes nothing.

        Raises:
            BadTensor: the prepared file is damaged.
        """
        if (facts := self._prepared()).get(UPDATE_KEY) != update:
            return
        round_ = int(facts[ROUND_KEY])
        self._pending.replace(self._file(round_))
        sync_folder(self._folder)
        keep = sorted(number for number in self._rounds() if number <= round_)[-2:]
        for number in set(self._rounds()).difference(keep):
            self._file(number).unlink()

    def discard(self, update: str) -> None:
        """Forget what was prepared with an update that is given up.

        Raises:
            BadTensor: as for :meth:`commit`.
        """
        if self._prepared().get(UPDATE_KEY) == update:
            self._pending.unlink()

    def _prepared(self) -> dict[str, str]:
        return Manifest.read(self._pending).metadata if self._pending.exists() else {}

    def _rounds(self) -> list[int]:
        return [int(file.stem.removeprefix("round-")) for file in self._folder.glob("round-*.safetensors")]

    def _file(self, round_: int) -> Path:
        return self._folder / f"round-{round_}.safetensors"
