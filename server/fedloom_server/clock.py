"""The clock that waits go by: it runs on evenly, whatever is done to the time of day."""

import asyncio


def now_s() -> float:
    """Seconds on the event loop's clock."""
    return asyncio.get_running_loop().time()
