"""The sites that the federation knows, in memory and as rows that outlive the coordinator."""

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from fedloom_common.errors import FederationError
from fedloom_server.adapters.parts import PartFile
from fedloom_server.downlink import Delta
from fedloom_server.eligibility import Description
from fedloom_server.federationrecords import SiteRecord, SiteState
from fedloom_server.records import Assignment, Run
from fedloom_server.store import Store

FLUSH_S = 1.0  # attaching and detaching is written so much later, many at a time
FLUSH_ROWS = 50  # of one transaction, so that it takes milliseconds

logger = logging.getLogger(__name__)


class Link(Protocol):
    """The coordinator's way to speak to one site."""

    def assign(
        self,
        assignment: Assignment,
        run: Run,
        delta: Delta | None,
        folds: Sequence[PartFile] = (),
        counted_round: int | None = None,
    ) -> None:
        """Send an assignment, with a smaller way to its model and what is folded under it, if any.

        ``counted_round`` is the last round whose update of the site counts; None if that is of no matter.
        """

    def grant(self, assignment_id: str, offset: int) -> None:
        """Give leave to upload from an offset."""

    def cancel(self, assignment_id: str, reason: str, *, counts: bool = False) -> None:
        """Say that an assignment is no longer wanted, or that its update has come and counts."""

    def run_ended(self, run_id: str, *, may_resume: bool) -> None:
        """Say that a run has ended, for good or until an operator resumes it."""

    def close(self, reason: str) -> None:
        """Tell the site to attach again later, and end the session."""

    def displace(self) -> None:
        """End the session for a newer one of the same site."""

    def refuse(self, reason: str) -> None:
        """End the session at once; the site may not attach again before a person has changed something."""


@dataclass(kw_only=True)
class Site:
    """A site that has attached, or of which an operator has spoken."""

    record: SiteRecord
    description: Description
    link: Link | None = None
    """None while it is not connected."""
    certificate_expires_s: float = 0.0
    """When the certificate with which it last attached ends, in seconds since 1970; 0 if not known."""

    @property
    def name(self) -> str:
        """The name in its certificate."""
        return self.record.name

    @property
    def labels(self) -> dict[str, str]:
        """Its own labels, under those that an operator gave it."""
        both = self.record.own_labels | self.record.operator_labels
        return {name: value for name, value in both.items() if value}

    @property
    def standstill(self) -> str:
        """Why it gets no new work; empty if it may."""
        return {
            SiteState.ACTIVE: "",
            SiteState.DRAINING: "draining",
            SiteState.BLOCKED: "blocked",
        }[self.record.state]

    def heard(self) -> None:
        """Note that it has said something."""
        self.record.last_heard_s = time.time()


class Roster:
    """Every known site by name; what changes is in the database a moment later, or at once if asked."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sites = {
            record.name: Site(record=record, description=Description.of(record.description))
            for record in store.sites()
        }
        self._unsaved: dict[str, None] = {}
        self._flushing: asyncio.TimerHandle | None = None

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites.values())

    def get(self, name: str) -> Site | None:
        """A site; None if it is not known."""
        return self._sites.get(name)

    def add(self, name: str) -> Site:
        """A site of whom nothing is known yet but its name, or the one that is known."""
        if name not in self._sites:
            self._sites[name] = Site(record=SiteRecord(name=name), description=Description())
        return self._sites[name]

    def introduced(self, site: Site, description: Description, labels: dict[str, str]) -> None:
        """A site has said what it is."""
        record = site.record
        site.description, record.description = description, asdict(description)
        record.own_labels = labels
        site.heard()
        record.first_heard_s = record.first_heard_s or record.last_heard_s
        self.save_later(site)

    def save(self, site: Site) -> None:
        """Make a site's row durable before anything else happens."""
        self._store.save(site.record)
        self._unsaved.pop(site.name, None)

    def save_later(self, site: Site) -> None:
        """Make a site's row durable together with others: a thousand sites may attach at once."""
        self._unsaved[site.name] = None
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    def remove(self, site: Site) -> None:
        """Forget a site."""
        self._unsaved.pop(site.name, None)
        self._store.remove_site(site.name)
        self._sites.pop(site.name, None)

    def flush(self) -> None:
        """Write what has yet to be written, as far as the database takes it."""
        if self._flushing is not None:
            self._flushing.cancel()
        while self._unsaved and self._write_some():
            pass

    def _flush(self) -> None:
        self._write_some()
        again = bool(self._unsaved)
        self._flushing = asyncio.get_running_loop().call_later(FLUSH_S, self._flush) if again else None

    def _write_some(self) -> bool:
        """Write some rows; False if the database does not take them, and they are kept for later."""
        names = list(itertools.islice(self._unsaved, FLUSH_ROWS))
        try:
            self._store.save(*(self._sites[name].record for name in names))
        except FederationError as error:
            logger.warning("sites have yet to be written", extra={"reason": str(error)})
            return False
        for name in names:
            del self._unsaved[name]
        return True
