"""The daemon's HTTP port: what makes a site ready, and what it tells Prometheus; loaded if configured."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from platform import python_version

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, generate_latest

from fedloom_client.assignments import Assignments
from fedloom_client.config import SiteConfig
from fedloom_client.outbox import Outbox
from fedloom_client.status import Status
from fedloom_common.certificates import certificate_expiry
from fedloom_common.errors import BadSpec
from fedloom_common.httpport import http_encryption
from fedloom_common.vitals import Check, LoopLag, disk_above
from fedloom_common.web import Vitals, http_port


@dataclass(frozen=True, kw_only=True)
class Observed:
    """The parts of the daemon whose state is told."""

    config: SiteConfig
    status: Status
    assignments: Assignments
    outbox: Outbox


@asynccontextmanager
async def site_port(address: str, observed: Observed) -> AsyncIterator[int]:
    """Serve /healthz, /readyz and /metrics at host:port inside the block; gives the port.

    Raises:
        BadSpec: the address cannot be listened on.
    """
    config, lag = observed.config, LoopLag()
    vitals = Vitals(lag=lag, checks=_readiness(observed), metrics=SitePage(observed, lag).render)
    async with http_port(address, http_encryption(address, config.http_tls, config.tls), vitals) as port:
        yield port


def _readiness(observed: Observed) -> dict[str, Check]:
    async def session() -> str | None:
        return observed.status.trouble

    config = observed.config
    return {"session": session, "disk": disk_above(config.state_dir, config.disk_floor_bytes)}


class SitePage:
    """The page /metrics."""

    def __init__(self, observed: Observed, lag: LoopLag) -> None:
        self._seen, self._lag = observed, lag
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        build = self._gauge("build_info", "The release that runs; always 1.", "version", "python_version")
        build.labels(version("fedloom"), python_version()).set(1)
        self._attached = self._gauge("site_attached", "1 while a session with the coordinator is open.")
        self._work = self._gauge("site_assignments", "Assignments that are waiting or under way.")
        self._undelivered = self._gauge("site_undelivered_updates", "Finished updates not yet delivered.")
        self._loop_lag = self._gauge(
            "event_loop_lag_seconds", "Latest wake-up of the event loop in half a minute."
        )
        if observed.config.tls is not None:
            self._expiry = self._gauge(
                "certificate_not_after_timestamp_seconds", "When the certificate ends, since 1970."
            )
        self._free = self._gauge("state_disk_free_bytes", "Free space on the disk of state_dir.")
        self._size = self._gauge("state_disk_size_bytes", "Size of the disk of state_dir.")

    async def render(self) -> bytes:
        """The page in Prometheus' text format."""
        seen = self._seen
        undelivered = len(list(seen.outbox))
        self._attached.set(seen.status.trouble is None)
        self._undelivered.set(undelivered)
        self._work.set(len(seen.assignments.open_ids()) - undelivered)
        self._loop_lag.set(self._lag.worst_s)
        return await asyncio.to_thread(self._read_disk)

    def _read_disk(self) -> bytes:
        config = self._seen.config
        usage = shutil.disk_usage(config.state_dir)
        self._free.set(usage.free)
        self._size.set(usage.total)
        if config.tls is not None:
            try:
                self._expiry.set(certificate_expiry(config.tls.certificate).timestamp())
            except BadSpec:  # gone or half written: the alert for an ended certificate is the right one
                self._expiry.set(0)
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"fedloom_{name}", text, labels, registry=self._registry)
