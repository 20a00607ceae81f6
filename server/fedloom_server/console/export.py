"""A run's model as a directory that ``AutoModelForCausalLM.from_pretrained`` loads."""

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedloom.v1.runs_pb2 import ExportRequest, ExportResponse
from fedloom.v1.session_pb2 import Blob
from fedloom_common.controls import drop_controls, has_controls
from fedloom_common.digests import DIGEST, has_digest, is_digest, plain_name
from fedloom_common.errors import ProtocolError, StorageFull, WrongState
from fedloom_common.files import storage_errors, write_text
from fedloom_common.transfer import download
from fedloom_server.console.adapterfiles import made_names, make_files
from fedloom_server.console.connection import Coordinator
from fedloom_server.console.formats import bytes_text

CARD = "README.md"
MARKER = ".fedloom-export.json"  # says whose export a directory is, and which files belong to it
ARRIVING = ".fedloom-arriving"  # holds the files until all are there
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class AsAdapter:
    """The adapter is wanted, and not a whole model."""

    base_name: str = ""
    """Where peft is to look for the base: a directory or a name; as the run's spec named it if empty."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """A finished export."""

    run_id: str
    round: int
    """The round that the model came of."""
    rounds_done: int
    """Rounds that the run has finished; without any the model is the initial one."""
    directory: Path
    size_bytes: int
    """Of its files; an adapter's are other ones than those that came for it."""


async def export(
    coordinator: Coordinator,
    run_id: str,
    directory: Path,
    *,
    round_number: int | Literal["best"] | None = None,
    adapter: AsAdapter | None = None,
    on_bytes: Callable[[int, int], None] = lambda _done, _total: None,
) -> Export:
    """Fetch a model's files and its card; ``on_bytes`` hears how many bytes of how many are there.

    Of a run that trained adapters they are made into a whole model, or into one ``adapter`` for peft.

    All files take their names only when every one is whole and checked, so an earlier export in the
    directory stays as it was until then. What a broken call left is taken up by the next.

    Raises:
        WrongState: the directory holds something else than an earlier export of the same run, or the run
            trained no adapter and one is wanted.
        StorageFull: the files do not fit on the disk.
        ProtocolError: the coordinator named a file that is not a plain name.
        FederationError: the coordinator has no such model, or could not send it.
    """
    answer = await _ask(coordinator, run_id, round_number, adapter)
    full_id = answer.run.id
    earlier = _earlier_files(directory, full_id)
    files = _named_files(answer)
    total = sum(file.size_bytes for file in files)
    with _writing(directory, total):
        directory.mkdir(parents=True, exist_ok=True)
        _require_space(directory, total)
        names = _names(answer, adapter)
        _write_marker(directory, full_id, earlier | names)
        await _fetch(coordinator, files, directory, lambda done: on_bytes(done, total))
        made = await asyncio.to_thread(_make, answer, directory / ARRIVING, adapter)
        _put_in_place(answer.model_card, made, directory)
        for name in earlier - names:
            (directory / name).unlink(missing_ok=True)
        _write_marker(directory, full_id, names)
    made_bytes = sum((directory / name).stat().st_size for name in names)
    return Export(
        run_id=full_id, round=answer.round, rounds_done=answer.run.rounds_done, directory=directory,
        size_bytes=made_bytes,
    )  # fmt: skip


async def _ask(
    coordinator: Coordinator,
    run_id: str,
    round_number: int | Literal["best"] | None,
    adapter: AsAdapter | None,
) -> ExportResponse:
    request = ExportRequest(
        run_id=run_id, round=None if round_number == "best" else round_number,
        best=round_number == "best", as_adapter=adapter is not None,
    )  # fmt: skip
    answer: ExportResponse = await coordinator.call(coordinator.runs.Export, request)
    if adapter is not None and not answer.frozen:
        raise WrongState(
            f"run {answer.run.id} trained the whole model: there is no adapter to export; leave --adapter out"
        )
    return answer


def _named_files(answer: ExportResponse) -> list[Blob]:
    """All that is to come, once its names are found to be harmless."""
    check_names(answer.files)
    check_names(answer.frozen)
    for fold in answer.folds:  # all have one name, and their digests tell them apart
        check_names([fold])
    return [*answer.files, *answer.frozen, *answer.folds]


def check_names(files: Iterable[Blob]) -> None:
    """Accept only files whose names and digests cannot lead out of the directory or hide another file.

    Raises:
        ProtocolError: naming the file.
    """
    seen = {CARD}
    for file in files:
        if not PLAIN_NAME.fullmatch(file.name):
            raise ProtocolError(
                f"the coordinator sends a file named {file.name!r}, which is not a plain file name; "
                "nothing was written"
            )
        if not is_digest(file.digest):
            raise ProtocolError(
                f"the coordinator names {file.name} by {file.digest!r}, wanted {DIGEST}; nothing was written"
            )
        if file.name in seen:
            raise ProtocolError(f"the coordinator sends {file.name} twice; nothing was written")
        seen.add(file.name)


def _earlier_files(directory: Path, run_id: str) -> set[str]:
    """Names of the files that an earlier export of the run put into the directory."""
    if not directory.exists():
        return set()
    if not directory.is_dir():
        raise WrongState(f"{directory} is a file; give a new or empty directory with --to")
    marker = directory / MARKER
    if marker.exists():
        known = _read_marker(marker)
        if known.get("run") == run_id:
            return {name for name in known.get("files", ()) if PLAIN_NAME.fullmatch(str(name))}
        raise WrongState(
            f"{directory} holds the model of run {known.get('run')}, not of {run_id}; give another directory "
            "with --to, or delete this one if it is not needed"
        )
    if any(directory.iterdir()):
        raise WrongState(
            f"{directory} is not empty and no export of run {run_id}; give a new or empty directory with --to"
        )
    return set()


def _read_marker(marker: Path) -> dict[str, Any]:
    try:
        known = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise WrongState(
            f"{marker} is damaged, so nothing says whose model is beside it; give another directory with --to"
        )
    return known


def _write_marker(directory: Path, run_id: str, names: set[str]) -> None:
    write_text(directory / MARKER, json.dumps({"run": run_id, "files": sorted(names)}))


@contextmanager
def _writing(directory: Path, size_bytes: int) -> Iterator[None]:
    try:
        with storage_errors(directory / MARKER, size_bytes):
            yield
    except OSError as error:
        raise WrongState(
            f"cannot write to {directory}: {error.strerror}; give another directory with --to"
        ) from error


def _require_space(directory: Path, size_bytes: int) -> None:
    arriving = directory / ARRIVING
    held = sum(item.stat().st_size for item in arriving.iterdir()) if arriving.exists() else 0
    free = shutil.disk_usage(directory).free
    wanted = size_bytes - held
    if wanted > free:
        raise StorageFull(
            f"{directory} has {bytes_text(free)} free and the model needs {bytes_text(wanted)} more; "
            "make room, or give a directory on another disk with --to"
        )


async def _fetch(
    coordinator: Coordinator, files: Iterable[Blob], directory: Path, on_bytes: Callable[[int], None]
) -> None:
    """Bring every file into the directory's ARRIVING folder."""
    arriving = directory / ARRIVING
    arriving.mkdir(exist_ok=True)
    before = 0
    for file in files:
        place = _place(arriving, file)
        if not await asyncio.to_thread(has_digest, place, file.digest):
            await download(
                coordinator.transfers,
                file.digest,
                file.size_bytes,
                place,
                on_bytes=lambda held, before=before: on_bytes(before + held),  # type: ignore[misc]
            )
        before += file.size_bytes
        on_bytes(before)


def _names(answer: ExportResponse, adapter: AsAdapter | None) -> set[str]:
    """Names of the directory's files."""
    if not answer.frozen:
        return {file.name for file in answer.files} | {CARD}
    return made_names(answer, as_adapter=adapter is not None) | {CARD}


def _make(answer: ExportResponse, arriving: Path, adapter: AsAdapter | None) -> dict[str, Path]:
    """Where each of the directory's files lies, by name."""
    if not answer.frozen:
        return {file.name: _place(arriving, file) for file in answer.files}
    return make_files(
        answer,
        lambda file: _place(arriving, file),
        arriving,
        as_adapter=adapter is not None,
        base_name="" if adapter is None else adapter.base_name,
    )


def _put_in_place(card: str, made: Mapping[str, Path], directory: Path) -> None:
    for name, path in made.items():
        if path.suffix == ".safetensors" and has_controls(path):
            drop_controls(path, directory / name)
        else:
            path.replace(directory / name)
    write_text(directory / CARD, card)
    shutil.rmtree(directory / ARRIVING)


def _place(arriving: Path, file: Blob) -> Path:
    # with the digest, so that a broken export of one round is never gone on with by another round's
    return arriving / f"{plain_name(file.digest)[:40]}.{file.name}"
