"""A limit on how many bytes, or other units, a second may pass."""

import asyncio
import math


class Pace:
    """Lets bytes pass at a rate, with at most a second's worth at once; shared by all that it limits."""

    def __init__(self, bytes_per_s: float | None) -> None:
        """Without a rate, bytes pass at once."""
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0

    @property
    def burst_bytes(self) -> float:
        """What may pass at once."""
        return math.inf if self._bytes_per_s is None else self._bytes_per_s

    async def take(self, count: int) -> None:
        """Wait until so many bytes more may pass."""
        if self._bytes_per_s is None:
            return
        now_s = asyncio.get_running_loop().time()
        self._free_at_s = max(self._free_at_s, now_s - 1.0) + count / self._bytes_per_s
        if self._free_at_s > now_s:
            await asyncio.sleep(self._free_at_s - now_s)
