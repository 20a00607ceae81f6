"""The HTTP port of a process: /healthz, /readyz and /metrics, served in its own event loop.

Nothing can be changed through it, and it says nothing of data, tensors, or what runs are called.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedloom_common.bursts import Bursts, untold_fact
from fedloom_common.certificates import read_credential
from fedloom_common.errors import BadSpec, FederationError
from fedloom_common.identity import TlsFiles
from fedloom_common.rotation import ChangingFiles
from fedloom_common.vitals import HANGS_S, Check, LoopLag, troubles

CONNECTIONS = 64  # no probe or scraper needs more; the process's file descriptors are for sites
LIFE_S = 60.0  # of a connection, whatever it does: one that says nothing has no limit of uvicorn's own
STOP_S = 1
RENEWAL_S = 60.0
REPEAT_S = 60.0  # lines of uvicorn's that anybody can cause: one of a kind in this time

UVICORN_LOG = logging.getLogger("uvicorn.error")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """What the pages tell."""

    lag: LoopLag
    checks: Mapping[str, Check]
    """What must hold before the process is ready, by name."""
    metrics: Callable[[], Awaitable[bytes]]
    """The metrics in Prometheus' text format."""


@asynccontextmanager
async def http_port(address: str, tls: TlsFiles | None, vitals: Vitals) -> AsyncIterator[int]:
    """Serve at host:port inside the block; gives the port.

    Raises:
        BadSpec: the address cannot be listened on, or the certificate cannot be used.
    """
    listener = _listen(address)
    port = listener.getsockname()[1]
    server = _Server(_config(vitals, tls))
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    background = [asyncio.create_task(vitals.lag.watch(), name="lag")]
    seldom = _Seldom()
    UVICORN_LOG.addFilter(seldom)
    try:
        await server.until_up(serving)
        if tls is not None:
            background.append(asyncio.create_task(_renew(server.config.ssl, tls), name="http-renewal"))
        logger.info("HTTP port open", extra={"http": address, "port": port, "tls": tls is not None})
        yield int(port)
    finally:
        server.should_exit = True
        for task in background:
            task.cancel()
        await asyncio.wait([serving, *background])
        listener.close()
        UVICORN_LOG.removeFilter(seldom)


def pages(vitals: Vitals) -> Starlette:
    """The three pages."""

    async def healthz(request: Request) -> Response:
        lag_s = vitals.lag.latest_s
        facts = {"event_loop_lag_seconds": round(lag_s, 4)}
        return JSONResponse(facts, status_code=200 if lag_s < HANGS_S else 503)

    async def readyz(request: Request) -> Response:
        wrong = await troubles(vitals.checks)
        body = [{"check": name, "problem": problem} for name, problem in wrong.items()]
        return JSONResponse({"ready": not wrong, "problems": body}, status_code=503 if wrong else 200)

    async def metrics(request: Request) -> Response:
        return Response(await vitals.metrics(), media_type=CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]
    )


class _Server(uvicorn.Server):
    """A server that leaves signals to the process, and says when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._up = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._up.set()

    async def until_up(self, serving: "asyncio.Task[None]") -> None:
        """Wait until requests are served."""
        up = asyncio.create_task(self._up.wait())
        await asyncio.wait({serving, up}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if serving.done():
            serving.result()
            raise FederationError("the HTTP server ended as soon as it began")


class _Seldom(logging.Filter):
    """Passes one warning of a kind now and then: nobody fills a disk with what is no HTTP."""

    def __init__(self) -> None:
        super().__init__()
        self._told = Bursts(1 / REPEAT_S, 1)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno > logging.WARNING:
            return True
        untold = self._told.untold(record.msg)
        if untold is not None:
            vars(record).update(untold_fact(untold))
        return untold is not None


class _Brief(H11Protocol):
    """One connection: bounded in number and in time."""

    def connection_made(self, transport: Any) -> None:
        self._began_s = self.loop.time()
        alive = [it for it in self.connections if isinstance(it, _Brief) and not it.transport.is_closing()]
        if len(alive) >= CONNECTIONS:  # the newest may be a probe, on which the process's life depends
            min(alive, key=lambda one: one._began_s).transport.abort()
        super().connection_made(transport)
        self.loop.call_later(LIFE_S, transport.close)


def _config(vitals: Vitals, tls: TlsFiles | None) -> uvicorn.Config:
    config = uvicorn.Config(
        pages(vitals), http=_Brief, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_graceful_shutdown=STOP_S,
        ssl_certfile=None if tls is None else tls.certificate, ssl_keyfile=None if tls is None else tls.key,
    )  # fmt: skip
    if tls is not None:
        read_credential(tls.ca, tls.certificate, tls.key)  # says what is wrong better than ssl does
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise BadSpec(f"the HTTP port cannot use {tls and tls.certificate}: {error}") from error
    return config


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(CONNECTIONS)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise BadSpec(
            f"http: cannot listen on {address}: {error}; give another host:port, or leave http out"
        ) from error
    listener.setblocking(False)
    return listener


async def _renew(context: ssl.SSLContext | None, tls: TlsFiles) -> NoReturn:
    """Let new connections have a renewed certificate."""
    assert context is not None, "a port with TLS has a context"
    files = ChangingFiles(tls.certificate, tls.key)
    while True:
        await asyncio.sleep(RENEWAL_S)
        if not files.have_changed():
            continue
        try:
            read_credential(tls.ca, tls.certificate, tls.key)
            context.load_cert_chain(tls.certificate, tls.key)
        except (FederationError, OSError) as error:
            logger.warning("the HTTP port keeps its old certificate", extra={"reason": str(error)})
        else:
            logger.info("the HTTP port has a renewed certificate")
