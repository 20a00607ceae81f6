"""The page /metrics: what the coordinator has counted, and how things stand at this moment."""

import asyncio
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Gauge, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fedloom_common.certificates import certificate_expiry
from fedloom_common.errors import BadSpec, StorageUnavailable
from fedloom_common.nativelines import handshakes
from fedloom_common.revocation import read_revocations
from fedloom_common.vitals import LoopLag
from fedloom_server.assignments import Assignments
from fedloom_server.config import CoordinatorConfig, CoordinatorTls
from fedloom_server.meters import Meters
from fedloom_server.records import RunState
from fedloom_server.rpc.access import TABLE
from fedloom_server.rpc.calls import READ, WRITE, Calls
from fedloom_server.sites import Sites
from fedloom_server.store import Store
from fedloom_server.trust import Trust

ENDED_S = 0.0  # of a file that is gone or half written: the alert for an ended one is the right one


@dataclass(frozen=True, kw_only=True)
class Observed:
    """The parts of the coordinator whose state the page tells."""

    config: CoordinatorConfig
    store: Store
    sites: Sites
    assignments: Assignments
    calls: Calls
    trust: Trust | None
    lag: LoopLag


class MetricsPage:
    """Everything under one registry, so that several coordinators in one process never mix."""

    def __init__(self, meters: Meters, observed: Observed) -> None:
        self._registry = meters.registry
        self._seen = observed
        ProcessCollector(registry=self._registry)
        self._registry.register(_Counts(observed.trust))
        if observed.config.tls is not None:
            self._registry.register(_Endings(observed.config.tls))
        gauge = self._gauge
        self._database = gauge("database_up", "1 if the database answers.")
        self._runs = gauge("runs", "Runs by state.", ["state"])
        self._sites = gauge("sites", "Sites: connected now, and known.", ["state"])
        self._calls = gauge("calls_under_way", "gRPC calls under way, by method.", ["method"])
        self._uploads = gauge("uploads", "Uploads of updates: under way, and waiting their turn.", ["state"])
        self._downloads = gauge("downloads", "Downloads of models: under way, and waiting.", ["state"])
        self._staged = gauge("staged_updates", "Updates that lie on disk and are not yet folded.")
        self._lag = gauge("event_loop_lag_seconds", "Latest wake-up of the event loop in half a minute.")
        self._free = gauge("state_disk_free_bytes", "Free space on the disk of state_dir.")
        self._size = gauge("state_disk_size_bytes", "Size of the disk of state_dir.")
        self._draining = gauge("draining", "1 while the coordinator drains before its end.")

    async def render(self) -> bytes:
        """The page in Prometheus' text format."""
        self._read_memory()
        await asyncio.to_thread(self._read_disk)
        return await asyncio.to_thread(generate_latest, self._registry)

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(f"fedloom_{name}", text, tuple(labels), registry=self._registry)

    def _read_memory(self) -> None:
        """What only the event loop may read."""
        seen, sites = self._seen, self._seen.sites.all()
        self._sites.labels("known").set(len(sites))
        self._sites.labels("connected").set(sum(site.link is not None for site in sites))
        for method in TABLE:
            self._calls.labels(method).set(seen.calls.under_way[method])
        turns = seen.assignments.uploads.turns
        self._uploads.labels("under_way").set(seen.calls.under_way[WRITE])
        self._uploads.labels("waiting").set(turns.waiting)
        self._staged.set(turns.staged)
        waiting = seen.calls.waiting[READ]
        self._downloads.labels("waiting").set(waiting)
        self._downloads.labels("under_way").set(seen.calls.under_way[READ] - waiting)
        self._lag.set(seen.lag.worst_s)
        self._draining.set(seen.calls.is_draining)

    def _read_disk(self) -> None:
        """What may take a moment."""
        config = self._seen.config
        self._count_runs()
        usage = shutil.disk_usage(config.state_dir)
        self._free.set(usage.free)
        self._size.set(usage.total)

    def _count_runs(self) -> None:
        try:
            runs = self._seen.store.count_runs()
        except StorageUnavailable:
            self._database.set(0)
            self._runs.clear()  # what they were is not what they are
            return
        self._database.set(1)
        for state in RunState:
            self._runs.labels(str(state)).set(runs.get(state, 0))


class _Counts(Collector):
    """Counts that are kept elsewhere: by native code for the whole process, and by who reads TLS files."""

    def __init__(self, trust: Trust | None) -> None:
        self._trust = trust

    def collect(self) -> Iterable[CounterMetricFamily]:
        name = "fedloom_tls_handshake_failures"
        yield CounterMetricFamily(name, "TLS handshakes with a peer that failed.", value=handshakes.failed)
        refused, text = self._trust.failures if self._trust else 0, "TLS files that changed and were wrong."
        yield CounterMetricFamily("fedloom_tls_files_refused", text, value=refused)


class _Endings(Collector):
    """When what is in the TLS files ends; they may change while the coordinator runs."""

    def __init__(self, tls: CoordinatorTls) -> None:
        self._tls = tls

    def collect(self) -> Iterable[GaugeMetricFamily]:
        tls = self._tls
        name = "fedloom_certificate_not_after_timestamp_seconds"
        yield GaugeMetricFamily(name, "When the certificate ends, since 1970.", value=_certificate_end_s(tls))
        if tls.crl is not None:
            name = "fedloom_revocation_list_not_after_timestamp_seconds"
            end_s = _revocations_end_s(tls.crl, tls.ca)
            yield GaugeMetricFamily(name, "When the revocation list ends, since 1970.", value=end_s)


def _certificate_end_s(tls: CoordinatorTls) -> float:
    try:
        return certificate_expiry(tls.certificate).timestamp()
    except BadSpec:
        return ENDED_S


def _revocations_end_s(crl: Path, ca: Path) -> float:
    try:
        return read_revocations(crl, ca.read_bytes()).expires.timestamp()
    except (BadSpec, OSError):
        return ENDED_S
