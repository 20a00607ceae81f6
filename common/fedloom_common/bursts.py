"""Events that come in floods: how many may pass at once and in a second, and how few are told."""

import time
from collections import Counter
from collections.abc import Callable, Hashable

KEPT_BUCKETS = 4096


class Buckets:
    """Token buckets: each holds ``burst``, refills at ``per_s``, and is born full."""

    def __init__(self, per_s: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._filled: dict[Hashable, tuple[float, float]] = {}
        """Tokens by key, and when that was so."""

    def take(self, key: Hashable) -> float:
        """Take a token; 0 if there was one, else the seconds until there is one."""
        now_s = self._clock()
        tokens, at_s = self._filled.pop(key, (self._burst, now_s))
        tokens = min(self._burst, tokens + (now_s - at_s) * self._per_s)
        wait_s = max(0.0, (1 - tokens) / self._per_s)
        self._filled[key] = (tokens if wait_s else tokens - 1, now_s)
        self._drop_full(now_s)
        return wait_s

    def _drop_full(self, now_s: float) -> None:
        """Forget the longest unused of too many; a bucket that is full again is as good as a new one."""
        while len(self._filled) > KEPT_BUCKETS:
            oldest = next(iter(self._filled))
            tokens, at_s = self._filled[oldest]
            if tokens + (now_s - at_s) * self._per_s < self._burst:
                return
            del self._filled[oldest]


class Bursts:
    """Which of many similar events to tell: the first, then a few now and then with the others' number."""

    def __init__(self, per_s: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._buckets = Buckets(per_s, burst, clock)
        self._untold: Counter[Hashable] = Counter()

    def untold(self, key: Hashable) -> int | None:
        """Events that went untold before this one, if it is to be told; else None."""
        if self._buckets.take(key):
            self._untold[key] += 1
            return None
        return self._untold.pop(key, 0)


def untold_fact(untold: int) -> dict[str, str]:
    """What a log line says of those that were left out before it."""
    return {"untold_before": str(untold)} if untold else {}
