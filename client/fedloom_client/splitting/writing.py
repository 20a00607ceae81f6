"""Folders of sites and the manifest, whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedloom_client.splitting.census import Records
from fedloom_client.splitting.formats import Format
from fedloom_client.splitting.rules import Split
from fedloom_client.splitting.skew import SiteShare, mean_distance
from fedloom_common.digests import digest_of_file
from fedloom_common.errors import BadSpec
from fedloom_common.files import storage_errors

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Made:
    """What is written into the manifest, so that the same split can be made again."""

    rule: Mapping[str, Any]
    format: Format
    inputs: Sequence[Path]
    shares: Sequence[SiteShare]


def write_sites(records: Records, split: Split, made: Made, into: Path) -> str:
    """Write ``into``/<site>/data and the manifest; the glob by which a site finds its files in its folder.

    Raises:
        BadSpec: the folder is there already, and not empty, or is the working directory.
        StorageFull: the disk is full; nothing stays.
    """
    with _whole_folder(into) as folder:
        folders = [folder / name / "data" for name in split.names]
        for place in folders:
            place.mkdir(parents=True)
        files = records.copy(split.sites, folders)
        (folder / MANIFEST).write_text(json.dumps(_manifest(made, files), indent=2) + "\n")  # ASCII
    return files


@contextmanager
def _whole_folder(into: Path) -> Iterator[Path]:
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise BadSpec(f"{into} is there already and not an empty folder: give --to another one")
    into = into.resolve()
    if into == Path.cwd():  # which is replaced, and a shell that stands in it would see none
        raise BadSpec(f"{into} is the working directory: give --to a folder in it, or another one")
    partial = into.with_name(f".{into.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        with storage_errors(partial):
            yield partial
        partial.replace(into)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _manifest(made: Made, files: str) -> dict[str, Any]:
    return {
        "made_by": f"fedloom data split {version('fedloom')}",
        "rule": made.rule,
        "inputs": [_input(path) for path in made.inputs],
        "data": {"format": made.format, "files": [files]},
        "distance": mean_distance(made.shares),
        "sites": {
            share.name: {key: value for key, value in asdict(share).items() if key != "name"}
            for share in made.shares
        },
    }


def _input(path: Path) -> dict[str, Any]:
    """What tells an input apart: of a directory the files in it that are data, splits' by their folders."""
    if path.is_file():
        files = {path.name: path}
    else:
        files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*.arrow"))}
    return {"path": str(path), "files": {name: digest_of_file(file) for name, file in files.items()}}
