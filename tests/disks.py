"""What a killed coordinator leaves: its state folder as it was at some moment."""

import shutil
import sqlite3
from contextlib import suppress
from pathlib import Path


def copy_of(state: Path, to: Path) -> Path:
    """A copy of a coordinator's state that is in use."""
    for path in state.rglob("*"):
        place = to / path.relative_to(state)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif not path.name.startswith(("coordinator.db", "lock")):
            with suppress(FileNotFoundError):  # a fold goes on meanwhile
                shutil.copyfile(path, place)
    with sqlite3.connect(state / "coordinator.db") as source, sqlite3.connect(to / "coordinator.db") as copy:
        source.backup(copy)
    source.close()
    copy.close()
    return to


def counted(state: Path) -> set[str]:
    """Trainings whose update counts, by what the database on a disk says."""
    with sqlite3.connect(state / "coordinator.db") as database:
        rows = database.execute(
            "select id from assignments where upper(state) = 'DONE' and upper(work) = 'TRAIN'"
        )
        found = {name for (name,) in rows}
    database.close()
    return found
