"""The coordinator's HTTP port: what makes it ready, and who measures it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from grpc_health.v1 import health, health_pb2

from fedloom_common.errors import StorageUnavailable
from fedloom_common.httpport import http_encryption
from fedloom_common.vitals import Check, LoopLag, disk_above, seldom
from fedloom_server.config import CoordinatorConfig
from fedloom_server.federation import Federation
from fedloom_server.rpc.calls import Calls
from fedloom_server.trust import Trust

STORAGE_LOOK_S = 30.0  # the object storage is others', and what it is asked may cost


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the port tells of."""

    config: CoordinatorConfig
    federation: Federation
    calls: Calls
    trust: Trust | None
    """None where certificates are switched off."""
    health: health.aio.HealthServicer


@asynccontextmanager
async def coordinator_port(service: Service) -> AsyncIterator[int | None]:
    """Serve /healthz, /readyz and /metrics inside the block, if the config asks for it; gives the port.

    Raises:
        BadSpec: the address cannot be listened on.
    """
    config, federation = service.config, service.federation
    if config.http is None:
        yield None
        return
    from fedloom_common.web import Vitals, http_port  # here: most coordinators of a test serve no pages
    from fedloom_server.web.metrics import MetricsPage, Observed

    lag = LoopLag()
    observed = Observed(
        config=config, store=federation.store, sites=federation.sites, assignments=federation.assignments,
        calls=service.calls, trust=service.trust, lag=lag,
    )  # fmt: skip
    page = MetricsPage(federation.meters, observed)
    vitals = Vitals(lag=lag, checks=readiness(service), metrics=page.render)
    async with http_port(
        config.http, http_encryption(config.http, config.http_tls, config.tls), vitals
    ) as port:
        yield port


def readiness(service: Service) -> dict[str, Check]:
    """What must hold for sites and operators to be served well."""
    config, store = service.config, service.federation.store

    async def draining() -> str | None:
        return "it goes away, and what is under way may end" if service.calls.is_draining else None

    async def serving() -> str | None:
        request = health_pb2.HealthCheckRequest()
        answer = await service.health.Check(request, None)
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return None
        return f"gRPC on {config.listen} does not serve: it starts, or ends"

    checks = {
        "draining": draining,
        "grpc": serving,
        "database": _answers(store.require_answer),
        "disk": disk_above(config.state_dir, config.disk_floor_bytes),
    }
    if config.model_storage:
        checks["model_storage"] = seldom(_answers(store.files.require_answer), STORAGE_LOOK_S)
    return checks


def _answers(require_answer: Callable[[], None]) -> Check:
    async def check() -> str | None:
        try:
            await asyncio.to_thread(require_answer)
        except StorageUnavailable as error:
            return str(error)
        return None

    return check
