"""Models that this site has anyway, in directories that its config names, found by digest."""

import asyncio
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fedloom_common.digests import digest_of_file
from fedloom_common.errors import BadSpec, StorageFull
from fedloom_common.files import write_text

logger = logging.getLogger(__name__)


def safetensors_in(directory: Path) -> list[Path]:
    """The safetensors files that lie in a directory itself, whether they can be read or not.

    Raises:
        BadSpec: it is none, cannot be looked into, or has no such file.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == ".safetensors")
    except NotADirectoryError as error:
        raise BadSpec(f"{directory} is no directory: name the one that the file lies in") from error
    except OSError as error:
        raise BadSpec(unreadable(directory, error)) from error
    if not paths:
        raise BadSpec(
            f"{directory} has no .safetensors file: name the directory that the file itself lies in"
        )
    return paths


def unreadable(path: Path, error: OSError) -> str:
    """Why a path cannot be read, and what to do."""
    if isinstance(error, PermissionError):
        todo = "let the daemon's user read it (save_pretrained lets its own user alone), or link to a copy"
    elif path.is_symlink():
        todo = "the link leads nowhere: make it anew"
    else:
        todo = "put it there, or correct models in the site's config"
    return f"{path} cannot be read ({error.strerror}): {todo}"


class LocalModels:
    """The safetensors files of some directories.

    A file is read once for its digest, which is then remembered for as long as its size and its time of
    change stay the same. What cannot be read is warned of, once, and passed over: it can be downloaded.
    """

    def __init__(self, directories: Mapping[str, Path], memory: Path) -> None:
        """``memory`` is the file in which digests are remembered."""
        self._directories = directories
        self._memory = memory
        self._looking = asyncio.Lock()
        self._told: set[object] = set()

    async def find(self, digest: str, size_bytes: int) -> Path | None:
        """The file of that digest; None if there is none."""
        if not self._directories:
            return None
        async with self._looking:  # a file is hashed by one assignment, and the others wait for it
            return await asyncio.to_thread(self._find, digest, size_bytes)

    def _find(self, digest: str, size_bytes: int) -> Path | None:
        for name, directory in self._directories.items():
            try:
                paths = safetensors_in(directory)
            except BadSpec as error:
                self._warn("a directory of models is of no use", model=name, reason=str(error))
                continue
            for path in paths:
                try:
                    if path.stat().st_size == size_bytes and self._digest(path) == digest:
                        return path.absolute()
                except OSError as error:
                    self._warn("a model file cannot be read", model=name, reason=unreadable(path, error))
        looked_in = ", ".join(map(str, self._directories.values()))
        self._warn("no model of the site's own is the one wanted: see which version it is of",
                   digest=digest, size_bytes=size_bytes, looked_in=looked_in)  # fmt: skip
        return None

    def _warn(self, message: str, **facts: object) -> None:
        what = (message, *facts.values())
        if what not in self._told:  # every round asks
            self._told.add(what)
            logger.warning(message, extra=facts)

    def _digest(self, path: Path) -> str:
        status, known = path.stat(), self._known()
        stamp, entry = f"{status.st_size} {status.st_mtime_ns}", known.get(str(path.absolute()), {})
        if entry.get("stamp") == stamp:
            return entry["digest"]
        digest = digest_of_file(path)
        text = json.dumps(known | {str(path.absolute()): {"stamp": stamp, "digest": digest}})
        with suppress(OSError, StorageFull):  # it is remembered only to save time
            write_text(self._memory, text)
        return digest

    def _known(self) -> dict[str, dict[str, str]]:
        try:
            return dict(json.loads(self._memory.read_text()))
        except (OSError, ValueError, TypeError):
            return {}
