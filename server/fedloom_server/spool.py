"""The working files of rounds under way: updates as they arrive, sums, what codecs have left out."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fedloom_common.digests import plain_name
from fedloom_common.partial import overwrite
from fedloom_common.spares import Spares
from fedloom_server.records import Assignment

UPDATE_SUFFIX = ".safetensors"
SPARE_UPDATES = 4


class Spool:
    """Folders whose files no row names by digest; a kill may leave any of them behind."""

    def __init__(self, state_dir: Path) -> None:
        self.folder = state_dir / "spool"
        self.folder.mkdir(exist_ok=True)
        self.spares = Spares(state_dir / "spares", most=SPARE_UPDATES)
        """Updates that are folded: others arrive in their place."""
        self._residuals = state_dir / "residuals"
        self._residuals.mkdir(exist_ok=True)  # a backup names it
        self._workshop = state_dir / "workshop"
        shutil.rmtree(self._workshop, ignore_errors=True)  # what a killed coordinator left is of no use
        self._workshop.mkdir()

    def update_path(self, assignment: Assignment) -> Path:
        """Where an assignment's update is spooled."""
        return self.folder / f"{assignment.id}{UPDATE_SUFFIX}"

    def place_for(self, assignment: Assignment) -> Path:
        """Where an assignment's update is to arrive, over a spare if nothing of it is there."""
        path = self.update_path(assignment)
        if not path.exists() and (spare := self.spares.take()):
            overwrite(spare, path)
        return path

    def sum_path(self, run_id: str, digest: str) -> Path:
        """Where the sum of a round's folded updates lies."""
        return self.folder / f"{run_id}.{plain_name(digest)}.sum"

    def mean_path(self, run_id: str, round_number: int) -> Path:
        """Where a round's mean is written."""
        return self.folder / f"{run_id}.{round_number}.model"

    def residual_folder(self, run_id: str) -> Path:
        """Where a run keeps what its way down has left out so far."""
        return self._residuals / run_id

    def new_workshop(self) -> Path:
        """A folder to make an initial model in; the caller removes it."""
        return Path(tempfile.mkdtemp(dir=self._workshop))

    def keep_only(self, wanted: Iterable[Path], run_id: str = "") -> None:
        """Remove files that nobody counts on any more; updates among them become spares.

        With a ``run_id`` only files of that run, whose names begin with it: other runs may write theirs.
        """
        names = {path.name for path in wanted}
        for path in self.folder.iterdir():
            bare = path.name.removeprefix(".")
            if not bare.startswith(run_id) or path.name in names or bare.removesuffix(".held") in names:
                continue
            if path.suffix == UPDATE_SUFFIX:
                self.spares.keep(path)
            else:
                path.unlink(missing_ok=True)
