"""Who is connected: the sites' sessions, and waiting for enough of them."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress

from fedloom_common.errors import NotPermitted
from fedloom_server.eligibility import Description, Wanted, fits, shortfall
from fedloom_server.federationrecords import SiteState
from fedloom_server.roster import Link, Roster, Site

LOOK_S = 0.2  # a run that waits looks at the sites so often at most, however many attach at once
RETURN_S = 35.0  # after a start; sites that were attached before try again at least every 30 s

logger = logging.getLogger(__name__)


class Sites:
    """The sites, and who of them is connected."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._changed = asyncio.Event()
        self.count_connected = 0
        self._listeners: list[Callable[[], None]] = []
        self._began_at_s = time.monotonic()

    @contextmanager
    def attached(
        self, name: str, description: Description, link: Link, labels: dict[str, str] | None = None
    ) -> Iterator[Site]:
        """A site's session: connected inside, not after. A new session takes the place of an older one.

        Raises:
            NotPermitted: the site is blocked.
        """
        if (refusal := self.refusal(name)) is not None:
            raise NotPermitted(refusal)
        site = self._roster.add(name)
        if site.link is not None:
            site.link.displace()
        self._roster.introduced(site, description, labels or {})
        site.link = link
        self.count_connected += 1
        logger.info("site attached", extra={"site": name, "data": ",".join(description.data_sets)})
        self.changed()
        try:
            yield site
        finally:
            self.count_connected -= 1
            if site.link is link:
                site.link = None
                logger.info("site detached", extra={"site": name})
                if self._roster.get(name) is site:
                    self._roster.save_later(site)
                self.changed()

    def all(self) -> list[Site]:
        """Every known site, by name."""
        return sorted(self._roster, key=lambda site: site.name)

    def connected(self) -> list[Site]:
        """Sites with a session, in no order."""
        return [site for site in self._roster if site.link is not None]

    def link(self, name: str) -> Link | None:
        """The way to a site; None while it is not connected."""
        site = self._roster.get(name)
        return site.link if site else None

    def refusal(self, name: str) -> str | None:
        """Why a site may not call; None if it may."""
        site = self._roster.get(name)
        if site is None or site.record.state is not SiteState.BLOCKED:
            return None
        return f"site {name} is blocked: {site.record.reason}"

    def data_bytes(self, name: str, data: str) -> int:
        """Size of a data set as its site told it; 0 if it has none of that name."""
        site = self._roster.get(name)
        return site.description.data_sets.get(data, 0) if site else 0

    def fitting(self, wanted: Wanted) -> list[str]:
        """Names of the connected sites that may be given a run's work, in order."""
        return sorted(site.name for site in self._of_rounds(wanted) if fits(site, wanted))

    def sessions(self, wanted: Wanted) -> dict[str, Link]:
        """The present session of each connected site that fits; a new one is another object."""
        return {site.name: site.link for site in self._of_rounds(wanted) if site.link and fits(site, wanted)}

    def shortfall(self, wanted: Wanted, needed: int) -> str:
        """How many of the connected sites fit, and what the others lack, for people."""
        return shortfall(self._of_rounds(wanted), wanted, needed=needed)

    def when_changed(self, notify: Callable[[], None]) -> None:
        """Have ``notify`` called whenever a site has come or gone, or may do other than before."""
        self._listeners.append(notify)

    def next_change(self) -> asyncio.Event:
        """Set when a site comes or goes, or may do other than before, at any time from now on."""
        return self._changed

    @property
    def may_return(self) -> bool:
        """Whether the coordinator has begun so lately that sites may still be on their way back to it."""
        return time.monotonic() < self._began_at_s + RETURN_S

    async def returned(self, names: Collection[str]) -> None:
        """Wait for sites that were attached to the coordinator before this one, as long as they may return.

        Whoever picks from those that are there would else pick from the first to come.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._began_at_s + RETURN_S - time.monotonic()):
                while any(self._is_missed(name) for name in names):
                    await self.next_change().wait()

    def _of_rounds(self, wanted: Wanted) -> list[Site]:
        return [site for site in self.connected() if site.name not in wanted.central]

    def _is_missed(self, name: str) -> bool:
        site = self._roster.get(name)
        if site is None:
            return True  # the kill came before it was written down
        return site.link is None and not site.standstill

    def changed(self) -> None:
        """Tell whoever waits for sites: one came or went, or may do other than before."""
        self._changed.set()
        self._changed = asyncio.Event()
        for notify in self._listeners:
            notify()
