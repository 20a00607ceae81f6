"""Signs of life for work that cannot tell how far it has come."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

BEAT_S = 5.0
LONGEST_S = 1800.0  # what has not ended by then hangs: silence lets the coordinator give it up


@asynccontextmanager
async def signs_of_life(say: Callable[[int], None]) -> AsyncIterator[None]:
    """Call ``say`` with 1, 2, 3 … every few seconds while the block lasts, but not for ever."""
    beating = asyncio.create_task(_beat(say))
    try:
        yield
    finally:
        beating.cancel()


async def _beat(say: Callable[[int], None]) -> None:
    for beat in range(1, int(LONGEST_S / BEAT_S) + 1):
        await asyncio.sleep(BEAT_S)
        say(beat)
