"""The coordinator as a whole: what it is made of, how it starts and how it ends."""

import asyncio
import logging
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedloom.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    metrics_pb2,
    metrics_pb2_grpc,
    runs_pb2,
    runs_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    sites_pb2,
    sites_pb2_grpc,
    transfer_pb2,
)
from fedloom_common.channels import SERVER_OPTIONS, most_calls, most_connections, window
from fedloom_common.errors import BadSpec
from fedloom_common.identity import require_loopback
from fedloom_common.memory import keep_freed_memory
from fedloom_server.admission import Admission
from fedloom_server.assignments import Assignments
from fedloom_server.config import CoordinatorConfig
from fedloom_server.federation import Federation
from fedloom_server.meters import Meters
from fedloom_server.metrics import Samples
from fedloom_server.models import MODEL_FILE
from fedloom_server.ownership import owned_store
from fedloom_server.reports import Reports
from fedloom_server.retention import collect_orphans
from fedloom_server.roster import Roster
from fedloom_server.rpc.audit import AuditEdge
from fedloom_server.rpc.calls import Calls
from fedloom_server.rpc.federation import FederationEdge
from fedloom_server.rpc.gate import Gate
from fedloom_server.rpc.metrics import MetricEdge
from fedloom_server.rpc.runs import RunEdge
from fedloom_server.rpc.sites import SiteEdge
from fedloom_server.rpc.transfer import TransferEdge
from fedloom_server.runs import Runs
from fedloom_server.sites import Sites
from fedloom_server.store import Store
from fedloom_server.watching import Watching
from fedloom_server.web.port import Service, coordinator_port

SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (session_pb2, "FederationService"),
        (transfer_pb2, "TransferService"),
        (runs_pb2, "RunService"),
        (audit_pb2, "AuditService"),
        (sites_pb2, "SiteService"),
        (metrics_pb2, "MetricService"),
    )
)

BROKEN_QUEUE_S = 10.0
MOST_CONNECTIONS = 4096  # one in its handshake takes 45 KB; a thousand sites have one or two each
CALLS_TO_REFUSE = 16  # of one connection at once: a flood of thousands would keep others waiting
STOP_S = 1.0  # for calls that end by nobody's will, such as a watcher's, once those that do have ended

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Coordinator:
    """A running coordinator."""

    port: int
    """Where it listens."""
    http_port: int | None
    """Where its pages are."""
    sites: Sites
    runs: Runs
    store: Store
    calls: Calls
    """The calls under way."""
    gate: Gate
    """Who may call."""
    working: asyncio.Task[None]
    """Works off the queue of runs."""
    owning: asyncio.Task[None]
    """Keeps the hold on the database; ends if another coordinator has it."""


@asynccontextmanager
async def coordinator(config: CoordinatorConfig) -> AsyncIterator[Coordinator]:
    """A coordinator that serves inside the block, and drains at its end."""
    keep_freed_memory()
    _open_more_files()
    with owned_store(
        config.state_dir, config.database_url, config.model_storage, config.model_cache_bytes
    ) as (store, ownership):
        await asyncio.to_thread(collect_orphans, store, config.keep_models)
        parts = _Parts.of(config, store)
        healthy = health.aio.HealthServicer()
        await healthy.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        service = Service(
            config=config,
            federation=parts.federation,
            calls=parts.calls,
            trust=parts.gate.trust,
            health=healthy,
        )
        async with coordinator_port(service) as http_port:
            server = _server(config, parts)
            health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
            port = _listen(server, config, parts.gate)
            await server.start()
            working = asyncio.create_task(_work(parts.runs), name="runs")
            owning = asyncio.create_task(ownership.keep(), name="ownership")
            keeping = asyncio.create_task(parts.gate.keep(), name="gate")
            sampling = asyncio.create_task(parts.samples.keep_writing(), name="samples")
            for name in ("", *SERVICES):
                await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
            facts = {"listen": config.listen, "port": port, "state_dir": config.state_dir}
            logger.info("coordinator ready", extra=facts)
            try:
                yield Coordinator(
                    port=port, http_port=http_port, sites=parts.federation.sites, runs=parts.runs,
                    store=store, calls=parts.calls, gate=parts.gate, working=working, owning=owning,
                )  # fmt: skip
            finally:
                owning.cancel()
                await _drain(service, server, working)
                keeping.cancel()
                sampling.cancel()
                await parts.samples.flush()
                store.audit_log.settle(at_end=True)
                parts.roster.flush()


async def _drain(service: Service, server: grpc.aio.Server, working: "asyncio.Task[None]") -> None:
    """Take nothing new on, let calls under way end, then stop; every run goes on after the next start."""
    await service.health.enter_graceful_shutdown()
    service.calls.drain()
    for site in service.federation.sites.all():
        if site.link is not None:
            site.link.close("the coordinator shuts down")
    # Rounds go on meanwhile: without them an update that arrives would not count.
    if not await _ended(service.calls, service.config.drain_s):
        logger.warning("calls are cut off", extra={"calls": dict(+service.calls.under_way)})
    working.cancel()
    await asyncio.wait([working])
    await server.stop(STOP_S)
    await _ended(service.calls, STOP_S)  # what was cut off lets go of its files


async def _ended(calls: Calls, seconds: float) -> bool:
    """Whether all calls that end by themselves have done so in time."""
    try:
        async with asyncio.timeout(seconds):
            await calls.until_ended()
    except TimeoutError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a coordinator is made of, beside its edges."""

    federation: Federation
    runs: Runs
    roster: Roster
    admission: Admission
    calls: Calls
    gate: Gate
    samples: Samples

    @classmethod
    def of(cls, config: CoordinatorConfig, store: Store) -> "_Parts":
        """The parts put together."""
        samples = Samples(store)
        roster, watching, meters = Roster(store), Watching(samples.note), Meters()
        sites = Sites(roster)
        assignments = Assignments(
            store,
            sites,
            meters,
            concurrent_uploads=config.concurrent_uploads,
            staged_updates=config.staged_updates,
        )
        federation = Federation(
            store=store, sites=sites, assignments=assignments, watching=watching, meters=meters,
            keep_models=config.keep_models,
        )  # fmt: skip
        calls = Calls()
        return cls(
            federation=federation, roster=roster, calls=calls, samples=samples,
            runs=Runs(federation, concurrent_runs=config.concurrent_runs),
            admission=Admission(roster, sites, assignments),
            gate=Gate(config, calls, store.audit_log, sites.refusal),
        )  # fmt: skip


async def _work(runs: Runs) -> None:
    """Work off the queue; after an error of the coordinator's own, such as a full disk, begin again."""
    while True:
        try:
            await runs.work()
        except Exception:
            logger.critical("the queue of runs broke off; it begins again", exc_info=True)
            await asyncio.sleep(BROKEN_QUEUE_S)


def _server(config: CoordinatorConfig, parts: "_Parts") -> grpc.aio.Server:
    """The services behind their guard."""
    federation, runs, calls = parts.federation, parts.runs, parts.calls
    store, sites, assignments = federation.store, federation.sites, federation.assignments
    gate, access, log = parts.gate, parts.gate.access, store.audit_log
    options = [
        *SERVER_OPTIONS,
        window(config.window_bytes),
        most_connections(min(MOST_CONNECTIONS, _most_files() // 2)),
        most_calls(config.limits.calls_at_once + CALLS_TO_REFUSE),
    ]
    server = grpc.aio.server(interceptors=[gate.guard], options=options)
    sessions = FederationEdge(
        gate, sites, Reports(federation), log, heartbeat_s=config.heartbeat_s, model_name=MODEL_FILE
    )
    session_pb2_grpc.add_FederationServiceServicer_to_server(sessions, server)
    transfers = TransferEdge(
        access, calls, store, assignments, concurrent_downloads=config.concurrent_downloads
    )
    server.add_generic_rpc_handlers((transfers.handlers(),))
    runs_pb2_grpc.add_RunServiceServicer_to_server(RunEdge(runs, sites, store, federation.watching), server)
    audit_pb2_grpc.add_AuditServiceServicer_to_server(AuditEdge(log), server)
    metrics_pb2_grpc.add_MetricServiceServicer_to_server(MetricEdge(store), server)
    sites_pb2_grpc.add_SiteServiceServicer_to_server(SiteEdge(parts.admission, store), server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server


def _listen(server: grpc.aio.Server, config: CoordinatorConfig, gate: Gate) -> int:
    try:
        if (credentials := gate.credentials()) is None:
            require_loopback(config.listen, "the coordinator's listen address")
            logger.warning("INSECURE: no encryption, identities are believed; only for tests on this machine")
            port = server.add_insecure_port(config.listen)
        else:
            port = server.add_secure_port(config.listen, credentials)
    except RuntimeError as error:
        raise BadSpec(
            f"cannot listen on {config.listen}: {error}; is another coordinator running?"
        ) from error
    return int(port)


def _open_more_files() -> None:
    """Raise the limit of open files as far as the system lets us: averaging opens every update of a round."""
    most = _most_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _most_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]
