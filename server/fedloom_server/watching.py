"""Changes for whoever watches a run: the latest state of each thing, never a backlog."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedloom_server.records import Assignment, Round, Run, Work


@dataclass(frozen=True, kw_only=True)
class SiteProgress:
    """How far a site has come with an assignment."""

    site: str
    round: int
    work: Work
    assignment_id: str
    phase: str
    done: int
    total: int
    loss: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class RoundChange:
    """A round and its assignments as they now stand."""

    round: Round
    assignments: list[Assignment]


Change = Run | RoundChange | SiteProgress


class Watching:
    """Passes changes of runs to their watchers.

    A slow watcher sees the latest state of each run, round and site, and
    misses what lay between. Memory: one change for each of these.
    """

    def __init__(self, also: Callable[[str, Change], None] = lambda run_id, change: None) -> None:
        """``also`` hears of every change of every run."""
        self._watchers: dict[str, set[Watcher]] = {}
        self._also = also

    def is_watched(self, run_id: str) -> bool:
        """Whether anybody would hear of a change."""
        return run_id in self._watchers

    def tell(self, run_id: str, change: Change) -> None:
        """Pass a change on."""
        self._also(run_id, change)
        for watcher in self._watchers.get(run_id, ()):
            watcher.put(change)

    @contextmanager
    def watcher(self, run_id: str) -> Iterator["Watcher"]:
        """Somebody who watches a run inside the block."""
        watcher = Watcher()
        self._watchers.setdefault(run_id, set()).add(watcher)
        try:
            yield watcher
        finally:
            self._watchers[run_id].discard(watcher)
            if not self._watchers[run_id]:
                del self._watchers[run_id]


class Watcher:
    """The changes that one watcher has yet to see."""

    def __init__(self) -> None:
        self._latest: dict[tuple[str, str], Change] = {}
        self._filled = asyncio.Event()

    def put(self, change: Change) -> None:
        """Add a change in place of an earlier one of the same thing."""
        match change:
            case Run():
                key = ("run", "")
            case RoundChange():
                key = ("round", str(change.round.number))
            case SiteProgress():
                key = ("site", change.site)
        self._latest.pop(key, None)
        self._latest[key] = change
        self._filled.set()

    async def get(self) -> Change:
        """The next change, as soon as there is one."""
        await self._filled.wait()
        key = next(iter(self._latest))
        change = self._latest.pop(key)
        if not self._latest:
            self._filled.clear()
        return change
