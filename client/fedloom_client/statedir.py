"""The daemon's own folder: what lies where, and that one daemon alone uses it."""

import fcntl
import hashlib
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedloom_client.training.controls import FOLDER as CONTROL_FOLDER
from fedloom_common.errors import BadSpec, WrongState

LEAVE_SIGNAL = signal.SIGUSR1
"""By it `fedloom client drain` asks the daemon to finish what it has and end."""

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class StateDir:
    """Places in the state folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models = root / "models"
        self.assets = root / "assets"
        self.frozen = root / "frozen"
        self.local_models = root / "local-models.json"
        self.outbox = root / "outbox"
        self.runs = root / "runs"
        self.packed = root / "packed"
        self.trainings = root / "trainings.json"
        self.status = root / "status.json"
        self._lock = root / "lock"

    def run_folder(self, run_id: str) -> Path:
        """What a site keeps of a run from round to round."""
        return self.runs / safe_name(run_id)

    def residual_folder(self, run_id: str) -> Path:
        """What a run's updates have left out; it goes with the run's other files."""
        return self.run_folder(run_id) / "residual"

    def control_folder(self, run_id: str) -> Path:
        """The site's control variates of a run; it goes with the run's other files."""
        return self.run_folder(run_id) / CONTROL_FOLDER

    def fold_folder(self, run_id: str) -> Path:
        """What rounds of a run have folded into the frozen weights; it goes with the run's other files."""
        return self.runs / safe_name(run_id) / "folds"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if it is missing, and keep every other daemon out of it.

        Raises:
            WrongState: another daemon uses the folder.
            BadSpec: the folder cannot be made or written.
        """
        try:
            for folder in (self.models, self.assets, self.frozen, self.outbox, self.runs):
                folder.mkdir(parents=True, exist_ok=True)
            file = self._lock.open("a+")
        except OSError as error:
            raise BadSpec(f"state_dir {self.root} cannot be used: {error.strerror}; give another") from error
        with file:
            self._claim(file.fileno())
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def holder(self) -> int | None:
        """The process of the daemon that uses the folder now; None if there is none."""
        try:
            file = self._lock.open("r")
        except OSError:
            return None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read())
        return None

    def _claim(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = self._lock.read_text().strip() or "unknown"
            raise WrongState(
                f"another client daemon (process {holder}) uses state_dir {self.root}; "
                "stop it, or give this one its own state_dir"
            ) from error


def safe_name(name: str) -> str:
    """A folder name for an id that came over the network: the id itself if it is plain, and never a path."""
    if _PLAIN.fullmatch(name):
        return name
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-")[:80]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:16]}".lstrip("-")
