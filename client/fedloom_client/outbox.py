"""Finished trainings: they wait for delivery, and after it until their run has gone on.

An entry is a folder with the update and, written last, its outcome.json: a folder without one is
work that was never finished. Entries survive a kill of the daemon; updates are not synced to disk, so
after a power cut their digest tells which are whole. A delivered update stays for the same reason: the
coordinator may ask for it again.

A training whose update is not written yet is put aside in the same folder, with a trained.json, where it has
to wait or the daemon is stopped: when the coordinator asks for it again, all but the training is done anew.
"""

import asyncio
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedloom_client.messages import Assignment, Outcome
from fedloom_client.residuals import Residuals
from fedloom_client.statedir import safe_name
from fedloom_client.training.orders import SPARE_UPDATE
from fedloom_common.digests import digest_of_file, has_digest
from fedloom_common.errors import StorageFull
from fedloom_common.files import clear_partials, sync_folder, write_text

UPDATE = "update.safetensors"
OUTCOME, ASIDE = "outcome.json", "trained.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One finished training."""

    run_id: str
    round: int
    attempt: int
    outcome: Outcome
    path: Path
    """The update file; of a training that is put aside the trained model, which the digest is of too."""


class Outbox:
    """The entries by assignment id."""

    def __init__(self, folder: Path, residuals: Residuals) -> None:
        """``residuals`` hear what became of each update."""
        self._folder = folder
        self._residuals = residuals
        self._entries: dict[str, Finished] = {}
        self._aside: dict[str, Finished] = {}
        self._delivered: set[str] = set()
        self._settled = asyncio.Event()
        self._newest: dict[str, tuple[int, int]] = {}
        """Round and attempt of the latest training that each run has asked for."""
        self._spare = folder.with_name("outbox.spare")

    def load(self) -> None:
        """Take up what an earlier daemon left, and clear away what it did not finish."""
        self._spare.unlink(missing_ok=True)
        for folder in sorted(self._folder.iterdir()):
            clear_partials(folder)
            if entry := _read(folder / OUTCOME):
                self._entries[entry.outcome.assignment_id] = entry
                logger.info(
                    "a finished training waits for delivery",
                    extra={"assignment": entry.outcome.assignment_id},
                )
            elif aside := _read(folder / ASIDE):
                self._aside[aside.outcome.assignment_id] = aside
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def __iter__(self) -> Iterator[str]:
        """Ids of the assignments whose update waits for delivery."""
        return (name for name in self._entries if name not in self._delivered)

    def get(self, assignment_id: str) -> Finished | None:
        """The entry of an assignment."""
        return self._entries.get(assignment_id)

    def aside(self) -> dict[str, Finished]:
        """By the ids of their assignments, the trainings that are put aside."""
        return self._aside

    def place_for(self, assignment_id: str) -> Path:
        """Where the update is to be written, in a new folder; an old one to overwrite may lie beside it."""
        path = self.update_path(assignment_id)
        path.parent.mkdir(exist_ok=True)
        if self._spare.exists():
            self._spare.replace(path.with_name(SPARE_UPDATE))
        return path

    def update_path(self, assignment_id: str) -> Path:
        """Where the update lies."""
        return self._folder / safe_name(assignment_id) / UPDATE

    async def add(self, assignment: Assignment, outcome: Outcome) -> Outcome:
        """Make a training durable whose update file is written; gives its outcome with the file's digest.

        Raises:
            StorageFull: the disk is full.
        """
        path = self.update_path(assignment.id)
        path.with_name(SPARE_UPDATE).unlink(missing_ok=True)  # if nothing overwrote it
        entry = await _write(path.with_name(OUTCOME), assignment, outcome, path)
        self._entries[assignment.id] = entry
        self._aside.pop(assignment.id, None)
        return entry.outcome

    async def put_aside(self, assignment: Assignment, outcome: Outcome, trained: Path) -> None:
        """Make a training durable whose update is yet to be written; one that cannot be is lost."""
        if assignment.id in self._aside:
            return
        try:
            entry = await _write(trained.with_name(ASIDE), assignment, outcome, trained)
        except FileNotFoundError:  # it has been encoded meanwhile
            return
        except (OSError, StorageFull) as error:
            facts = {"assignment": assignment.id, "error": str(error)}
            logger.warning("a training is not put aside", extra=facts)
        else:
            self._aside[assignment.id] = entry

    def delivered(self, assignment_id: str) -> None:
        """The coordinator has an assignment's update."""
        if entry := self._entries.get(assignment_id):
            self._residuals.deliver(entry.run_id, assignment_id)
            self._delivered.add(assignment_id)
            self._settled.set()
            if (entry.round, entry.attempt) < self._newest.get(entry.run_id, (0, 0)):
                self.remove(assignment_id)

    def remove(self, assignment_id: str) -> None:
        """Forget an assignment's training, finished or not."""
        entry, aside = self._entries.pop(assignment_id, None), self._aside.pop(assignment_id, None)
        if known := entry or aside:
            self._residuals.discard(known.run_id, assignment_id)
        self._delivered.discard(assignment_id)
        folder = self._folder / safe_name(assignment_id)
        if entry and entry.path.exists():
            entry.path.replace(self._spare)
        shutil.rmtree(folder, ignore_errors=True)
        self._settled.set()

    def end_run(self, run_id: str) -> None:
        """Keep nothing for a run's later rounds."""
        self._newest.pop(run_id, None)
        self._spare.unlink(missing_ok=True)

    def is_settled(self, run_id: str) -> bool:
        """Whether none of a run's trainings waits for delivery."""
        return self._delivered.issuperset(_of_run(run_id, self._entries))

    async def until_settled(self, run_id: str) -> None:
        """Wait until each of a run's trainings is delivered or given up."""
        while not self.is_settled(run_id):
            self._settled.clear()
            await self._settled.wait()

    def superseded_by(self, assignment: Assignment) -> list[str]:
        """Trainings of the same run that this newer one makes worthless: earlier rounds and attempts."""
        if assignment.work != "train":
            return []
        newest = self._newest[assignment.run_id] = (assignment.round, assignment.attempt)
        return [
            name
            for name, entry in self._all().items()
            if entry.run_id == assignment.run_id and (entry.round, entry.attempt) < newest
        ]

    def runs(self) -> set[str]:
        """Ids of the runs that have entries."""
        return {entry.run_id for entry in self._all().values()}

    def of_run(self, run_id: str) -> list[str]:
        """Ids of a run's entries."""
        return _of_run(run_id, self._all())

    def _all(self) -> dict[str, Finished]:
        return self._entries | self._aside


def _of_run(run_id: str, entries: Mapping[str, Finished]) -> list[str]:
    return [name for name, entry in entries.items() if entry.run_id == run_id]


async def _write(place: Path, assignment: Assignment, outcome: Outcome, file: Path) -> Finished:
    """Write what there is to know of a training whose file is written."""
    digest = await asyncio.to_thread(digest_of_file, file)
    entry = Finished(
        run_id=assignment.run_id,
        round=assignment.round,
        attempt=assignment.attempt,
        outcome=replace(outcome, update_digest=digest, update_bytes=file.stat().st_size),
        path=file,
    )
    text = json.dumps(asdict(entry) | {"path": file.name}, indent=2)
    await asyncio.to_thread(_make_durable, place, text)
    return entry


def _make_durable(place: Path, text: str) -> None:
    write_text(place, text)
    sync_folder(place.parent.parent)


def _read(place: Path) -> Finished | None:
    try:
        facts = json.loads(place.read_text())
        path = place.with_name(facts["path"])
        entry = Finished(**facts | {"outcome": Outcome.of(facts["outcome"]), "path": path})
        return entry if has_digest(path, entry.outcome.update_digest) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
