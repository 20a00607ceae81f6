"""Models that this site has anyway, in directories that its config names, found by digest."""

import asyncio
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from fedloom_common.digests import digest_of_file
from fedloom_common.files import write_text

logger = logging.getLogger(__name__)


class LocalModels:
    """The safetensors files of some directories.

    A file is read once for its digest, which is then remembered for as long as its size and its time of
    change stay the same.
    """

    def __init__(self, directories: Mapping[str, Path], memory: Path) -> None:
        """``memory`` is the file in which digests are remembered."""
        self._directories = directories
        self._memory = memory
        self._looking = asyncio.Lock()

    async def find(self, digest: str, size_bytes: int) -> Path | None:
        """The file of that digest; None if there is none."""
        if not self._directories:
            return None
        async with self._looking:  # a file is hashed by one assignment, and the others wait for it
            return await asyncio.to_thread(self._find, digest, size_bytes)

    def _find(self, digest: str, size_bytes: int) -> Path | None:
        for name, directory in self._directories.items():
            if not directory.is_dir():
                logger.warning("a directory of models is missing", extra={"model": name, "path": directory})
            for path in sorted(directory.glob("*.safetensors")):
                if path.stat().st_size == size_bytes and self._digest(path) == digest:
                    return path.absolute()
        return None

    def _digest(self, path: Path) -> str:
        status, known = path.stat(), self._known()
        stamp, entry = f"{status.st_size} {status.st_mtime_ns}", known.get(str(path.absolute()), {})
        if entry.get("stamp") == stamp:
            return entry["digest"]
        digest = digest_of_file(path)
        write_text(
            self._memory, json.dumps(known | {str(path.absolute()): {"stamp": stamp, "digest": digest}})
        )
        return digest

    def _known(self) -> dict[str, dict[str, str]]:
        try:
            return dict(json.loads(self._memory.read_text()))
        except (OSError, ValueError, TypeError):  # it is remembered only to save time
            return {}
