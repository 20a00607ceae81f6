"""Packed training and held-out examples: made once from the site's files, then mapped into memory."""

import fcntl
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedloom_client.training.blocks import pack_blocks
from fedloom_client.training.examples import Examples, Packed
from fedloom_client.training.records import Records
from fedloom_client.training.rows import pack_rows
from fedloom_client.training.tasks import AnyTask, RecordTask
from fedloom_common.files import write_text

PACKED_KEPT = 3  # of one data set: runs with different tasks or tokenizers take turns at a site
LOCK_POLL_S = 0.2  # so that a cancel is heard while another run's group packs

_PARTIAL = ".partial-"


@dataclass(frozen=True, kw_only=True)
class PackedData:
    """A data set as a task's examples."""

    train: Examples
    held_out: Examples
    packed: Packed

    @classmethod
    def open(cls, folder: Path) -> "PackedData":
        """Map what ``pack`` wrote."""
        packed = Packed.from_json((folder / "facts.json").read_text())
        return cls(
            train=Examples(folder / "train", packed.fields),
            held_out=Examples(folder / "held_out", packed.fields),
            packed=packed,
        )


def pack(
    records: Records, task: AnyTask, task_key: str, folder: Path, on_progress: Callable[[int, int], None]
) -> Path:
    """Make a task's examples of the records under ``folder``, unless that is done; the place of the result.

    ``task_key`` changes whenever the task would make other examples of the same records.

    Raises:
        TrainingFailed: the files or the tokenizer are unfit.
    """
    key = hashlib.sha256(f"{records.fingerprint()} {task_key}".encode()).hexdigest()
    packed = folder / key[:32]
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder, lambda: on_progress(0, records.total)):
        if not packed.is_dir():
            _drop_old(folder)
            partial = Path(tempfile.mkdtemp(dir=folder, prefix=_PARTIAL))
            _build(records, task, partial, on_progress)
            partial.rename(packed)
        packed.touch()
    return packed


def _build(records: Records, task: AnyTask, folder: Path, on_progress: Callable[[int, int], None]) -> None:
    if isinstance(task, RecordTask):
        packed = pack_rows(records, task, folder, on_progress)
    else:
        packed = pack_blocks(records, task, folder, on_progress)
    write_text(folder / "facts.json", packed.to_json())


@contextmanager
def _alone_in(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Keep out the worker groups of other runs that train on the same data set; a kill lets them in."""
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(LOCK_POLL_S)
        yield


def _drop_old(folder: Path) -> None:
    """Remove what a kill left, and all but the last of other texts, tokenizers and context lengths."""
    folders = [path for path in folder.iterdir() if path.is_dir()]
    folders.sort(key=lambda path: (path.name.startswith(_PARTIAL), -path.stat().st_mtime_ns))
    for number, old in enumerate(folders, start=1):
        if number >= PACKED_KEPT or old.name.startswith(_PARTIAL):
            shutil.rmtree(old)  # ranks that map it keep their pages
