"""Who is connected: the sites' sessions, and waiting for enough of them."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from fedloom_server.downlink import Delta
from fedloom_server.records import Assignment, Run

logger = logging.getLogger(__name__)


class Link(Protocol):
    """The coordinator's way to speak to one site."""

    def assign(self, assignment: Assignment, run: Run, delta: Delta | None) -> None:
        """Send an assignment, with a smaller way to its model if there is one."""

    def grant(self, assignment_id: str, offset: int) -> None:
        """Give leave to upload from an offset."""

    def cancel(self, assignment_id: str, reason: str, *, counts: bool = False) -> None:
        """Say that an assignment is no longer wanted, or that its update has come and counts."""

    def run_ended(self, run_id: str, *, may_resume: bool) -> None:
        """Say that a run has ended, for good or until an operator resumes it."""

    def close(self, reason: str) -> None:
        """Tell the site to attach again later, and end the session."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device on which a rank can train."""

    kind: str
    name: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a site said of itself when it attached."""

    software: str = ""
    memory_bytes: int = 0
    devices: tuple[Device, ...] = ()
    data_sets: dict[str, int]
    """Size in bytes by name."""


@dataclass(kw_only=True)
class Site:
    """A site that has attached at least once since the coordinator started."""

    name: str
    description: Description
    link: Link | None
    """None while it is not connected."""
    last_heard_s: float
    """Seconds since 1970."""

    def heard(self) -> None:
        """Note that the site has said something."""
        self.last_heard_s = time.time()


class Sites:
    """The sites, and who of them is connected."""

    def __init__(self) -> None:
        self._sites: dict[str, Site] = {}
        self._changed = asyncio.Condition()

    @contextmanager
    def attached(self, name: str, description: Description, link: Link) -> Iterator[Site]:
        """A site's session: connected inside, not after. A new session takes the place of an older one."""
        before = self._sites.get(name)
        if before is not None and before.link is not None:
            before.link.close("the site has attached again")
        site = Site(name=name, description=description, link=link, last_heard_s=time.time())
        self._sites[name] = site
        logger.info("site attached", extra={"site": name, "data": ",".join(description.data_sets)})
        self._notify()
        try:
            yield site
        finally:
            site.link = None
            logger.info("site detached", extra={"site": name})
            self._notify()

    def all(self) -> list[Site]:
        """Every site heard of, by name."""
        return [self._sites[name] for name in sorted(self._sites)]

    def link(self, name: str) -> Link | None:
        """The way to a site; None while it is not connected."""
        site = self._sites.get(name)
        return site.link if site else None

    def data_bytes(self, name: str, data: str) -> int:
        """Size of a data set as its site told it; 0 if it has none of that name."""
        site = self._sites.get(name)
        return site.description.data_sets.get(data, 0) if site else 0

    def offering(self, data: str) -> list[str]:
        """Names of the connected sites that have a data set."""
        return [site.name for site in self.all() if site.link and data in site.description.data_sets]

    async def wait_for(self, count: int, data: str, on_wait: Callable[[int], None]) -> list[str]:
        """Names of the sites that have a data set, as soon as ``count`` are connected.

        ``on_wait`` hears how many there are, each time that changes.
        """
        async with self._changed:
            while len(names := self.offering(data)) < count:
                on_wait(len(names))
                await self._changed.wait()
        return names

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.get_running_loop().create_task(notify())
        self._notifying = task  # a task that nothing holds may be collected before it has run
