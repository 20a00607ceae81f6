"""How large this site's data sets are: told when a session begins, and by a new one when that has changed."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

from fedloom_client.config import DataSource
from fedloom_client.hardware import data_set_bytes

LOOK_S = 60.0
REST_PER_LOOK = 50  # a look at a million files may take long: it shall not keep the disk busy

logger = logging.getLogger(__name__)


class Holdings:
    """The data sets' sizes, as they were told and as they are."""

    def __init__(self, sources: Mapping[str, DataSource]) -> None:
        self._sources = sources
        self._told: dict[str, int] = {}

    async def tell(self) -> dict[str, int]:
        """Sizes in bytes by name, as they are now."""
        told_before, self._told = self._told, await self._measure()
        for name, size in self._told.items():
            if not size and told_before.get(name) != 0:
                files = ", ".join(self._sources[name].files)
                logger.warning("a data set has no files", extra={"data": name, "files": files})
        return self._told

    async def keep_told(self, tell_again: Callable[[], object]) -> NoReturn:
        """Look at the sizes for ever; ``tell_again`` is called when they differ, and no longer change."""
        before = self._told
        pause_s = LOOK_S
        while True:
            await asyncio.sleep(pause_s)
            began_s = time.monotonic()
            sizes = await self._measure()
            pause_s = max(LOOK_S, REST_PER_LOOK * (time.monotonic() - began_s))
            if sizes == before and sizes != self._told:
                logger.info("the data sets have changed", extra={"bytes_by_name": sizes})
                tell_again()
            before = sizes

    async def _measure(self) -> dict[str, int]:
        return {
            name: await asyncio.to_thread(data_set_bytes, source) for name, source in self._sources.items()
        }
