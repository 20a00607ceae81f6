"""The coordinator as a whole: what it is made of, how it starts and how it ends."""

import asyncio
import logging
import resource
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedloom.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    runs_pb2,
    runs_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    sites_pb2,
    sites_pb2_grpc,
    transfer_pb2,
)
from fedloom_common.channels import SERVER_OPTIONS, window
from fedloom_common.errors import BadSpec
from fedloom_common.identity import require_loopback, server_credentials
from fedloom_common.memory import keep_freed_memory
from fedloom_server.admission import Admission
from fedloom_server.assignments import Assignments
from fedloom_server.config import CoordinatorConfig
from fedloom_server.database import open_database
from fedloom_server.models import MODEL_FILE
from fedloom_server.ownership import owned_folder
from fedloom_server.roster import Roster
from fedloom_server.rounds import Federation
from fedloom_server.rpc.access import Access, Guard
from fedloom_server.rpc.audit import AuditEdge
from fedloom_server.rpc.federation import FederationEdge
from fedloom_server.rpc.runs import RunEdge
from fedloom_server.rpc.sites import SiteEdge
from fedloom_server.rpc.transfer import TransferEdge
from fedloom_server.runs import Runs
from fedloom_server.sites import Sites
from fedloom_server.store import Store
from fedloom_server.watching import Watching

SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (session_pb2, "FederationService"),
        (transfer_pb2, "TransferService"),
        (runs_pb2, "RunService"),
        (audit_pb2, "AuditService"),
        (sites_pb2, "SiteService"),
    )
)

BROKEN_QUEUE_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Coordinator:
    """A running coordinator."""

    port: int
    """Where it listens."""
    sites: Sites
    runs: Runs
    store: Store
    working: asyncio.Task[None]
    """Works off the queue of runs."""


async def serve_until_signalled(config: CoordinatorConfig) -> None:
    """Run the coordinator until SIGTERM or SIGINT, then drain: rounds go on after the next start.

    Raises:
        BadSpec, WrongState: it cannot listen, or its state is in use by another coordinator.
    """
    signalled = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, signalled.set)
    async with coordinator(config):
        await signalled.wait()
        logger.info("draining", extra={"grace_s": config.drain_s})
    logger.info("coordinator stopped")


@asynccontextmanager
async def coordinator(config: CoordinatorConfig) -> AsyncIterator[Coordinator]:
    """A coordinator that serves inside the block."""
    keep_freed_memory()
    _open_more_files()
    with owned_folder(config.state_dir):
        database = open_database(config.database_url, config.state_dir)
        store, watching = Store(config.state_dir, database), Watching()
        roster = Roster(store)
        sites = Sites(roster)
        assignments = Assignments(
            store,
            sites,
            watching,
            concurrent_uploads=config.concurrent_uploads,
            staged_updates=config.staged_updates,
        )
        federation = Federation(
            store=store,
            sites=sites,
            assignments=assignments,
            watching=watching,
            keep_models=config.keep_models,
        )
        runs = Runs(federation)
        server = _server(config, federation, runs, Admission(roster, sites, assignments))
        healthy = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        port = _listen(server, config)
        await server.start()
        working = asyncio.create_task(_work(runs), name="runs")
        for name in ("", *SERVICES):
            await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        logger.info(
            "coordinator ready", extra={"listen": config.listen, "port": port, "state_dir": config.state_dir}
        )
        try:
            yield Coordinator(port=port, sites=sites, runs=runs, store=store, working=working)
        finally:
            await healthy.enter_graceful_shutdown()
            working.cancel()
            await asyncio.wait([working])
            for site in sites.all():
                if site.link is not None:
                    site.link.close("the coordinator shuts down")
            await server.stop(config.drain_s)
            roster.flush()
            store.close()


async def _work(runs: Runs) -> None:
    """Work off the queue; after an error of the coordinator's own, such as a full disk, begin again."""
    while True:
        try:
            await runs.work()
        except Exception:
            logger.critical("the queue of runs broke off; it begins again", exc_info=True)
            await asyncio.sleep(BROKEN_QUEUE_S)


def _server(
    config: CoordinatorConfig, federation: Federation, runs: Runs, admission: Admission
) -> grpc.aio.Server:
    """The services behind their guard."""
    store, sites, assignments = federation.store, federation.sites, federation.assignments
    access = Access(insecure=config.insecure, refusal=sites.refusal)
    options = [*SERVER_OPTIONS, window(config.window_bytes)]
    server = grpc.aio.server(interceptors=[Guard(access)], options=options)
    session_pb2_grpc.add_FederationServiceServicer_to_server(
        FederationEdge(access, sites, assignments, heartbeat_s=config.heartbeat_s, model_name=MODEL_FILE),
        server,
    )
    transfers = TransferEdge(access, store, assignments, concurrent_downloads=config.concurrent_downloads)
    server.add_generic_rpc_handlers((transfers.handlers(),))
    runs_pb2_grpc.add_RunServiceServicer_to_server(RunEdge(runs, sites, store, federation.watching), server)
    audit_pb2_grpc.add_AuditServiceServicer_to_server(AuditEdge(store.audit_log), server)
    sites_pb2_grpc.add_SiteServiceServicer_to_server(SiteEdge(admission, store), server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server


def _listen(server: grpc.aio.Server, config: CoordinatorConfig) -> int:
    try:
        if config.tls is None:
            require_loopback(config.listen, "the coordinator's listen address")
            logger.warning("INSECURE: no encryption, identities are believed; only for tests on this machine")
            port = server.add_insecure_port(config.listen)
        else:
            port = server.add_secure_port(config.listen, server_credentials(config.tls))
    except RuntimeError as error:
        raise BadSpec(
            f"cannot listen on {config.listen}: {error}; is another coordinator running?"
        ) from error
    return int(port)


def _open_more_files() -> None:
    """Raise the limit of open files as far as the system lets us: averaging opens every update of a round."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
