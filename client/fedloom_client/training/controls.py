"""A site's own control variates cₖ (SCAFFOLD), in the run's folder.

A training *prepares* them; ``leavings`` tells when they count, as the server's c counts them from then on.
The daemon says so, so torch may not enter this room.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom_client.training.orders import Order
from fedloom_common.leavings import Leavings
from fedloom_common.tensors import write_tensors

if TYPE_CHECKING:
    import torch

    from fedloom_client.training.group import Group

FOLDER = "control"  # within the run's


class SiteControls:
    """The control variates of one run."""

    def __init__(self, run_folder: Path) -> None:
        self.leavings = Leavings(run_folder / FOLDER)

    @property
    def present(self) -> Path | None:
        """The file from which a round begins; None at the site's first."""
        return self.leavings.kept if self.leavings.kept.exists() else None

    def prepare(self, controls: Mapping[str, "torch.Tensor"], order: Order, group: "Group") -> None:
        """Write the control variates that go with the update of an order; every rank gives its part.

        Raises:
            TrainingFailed: there is no room.
        """
        from fedloom_client.training.sharding import first_writes

        path, marks = self.leavings.prepared, self.leavings.marks(order.id, order.round)
        first_writes(group, controls, lambda whole: write_tensors(path, controls, marks, whole=whole))
