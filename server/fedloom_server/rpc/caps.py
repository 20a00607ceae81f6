"""How much one peer may ask for: calls at once, calls a second, sessions a minute."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from fedloom_common.bursts import Buckets
from fedloom_common.errors import TooManyCalls
from fedloom_common.identity import Peer
from fedloom_common.pace import Pace
from fedloom_server.config import Limits

ATTACH = "/fedloom.v1.FederationService/Attach"
MINUTE_S = 60.0
LINES_PER_S, LINES_AT_ONCE = 0.1, 20
"""Log lines of one kind that a peer can cause at will: nobody fills a disk by being refused."""


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
