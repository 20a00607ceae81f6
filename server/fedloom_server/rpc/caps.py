"""How much one peer may ask for: calls at once, calls a second, sessions a minute."""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from fedloom_common.errors import TooManyCalls
from fedloom_common.identity import Peer
from fedloom_common.pace import Pace
from fedloom_server.config import Limits

ATTACH = "/fedloom.v1.FederationService/Attach"
MINUTE_S = 60.0
KEPT_BUCKETS = 4096
LINES_PER_S, LINES_AT_ONCE = 0.1, 20
"""Log lines of one kind that a peer can cause at will: nobody fills a disk by being refused."""


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

    def __init__(self, per_s: float, burst: float) -> None:
        self._buckets = Buckets(per_s, burst)
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


class Caps:
    """What each peer has asked for lately."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._under_way: Counter[Peer] = Counter()
        self._calls = Buckets(limits.calls_per_s, limits.calls_burst)
        self._attaches = Buckets(limits.sessions_per_minute / MINUTE_S, limits.sessions_per_minute)

    @contextmanager
    def counted(self, method: str, peer: Peer) -> Iterator[None]:
        """Count a call while it is under way.

        Raises:
            TooManyCalls: the peer has too many under way, or makes them too fast.
        """
        limits = self._limits
        if self._under_way[peer] >= limits.calls_at_once:
            raise TooManyCalls(f"{peer} has {limits.calls_at_once} calls under way; end some first")
        if wait_s := self._calls.take(peer):
            raise TooManyCalls(
                f"{peer} makes more than {limits.calls_per_s:g} calls a second; try again in {wait_s:.1f} s"
            )
        if method == ATTACH and (wait_s := self._attaches.take(peer)):
            raise TooManyCalls(
                f"{peer} opens more than {limits.sessions_per_minute} sessions a minute; try again in "
                f"{wait_s:.1f} s, and see that no other daemon has the same certificate"
            )
        self._under_way[peer] += 1
        try:
            yield
        finally:
            self._under_way[peer] -= 1
            if not self._under_way[peer]:
                del self._under_way[peer]

    def pace(self) -> Pace:
        """The pace of the messages of one session."""
        return Pace(self._limits.messages_per_s)
