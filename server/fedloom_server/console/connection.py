"""How the console reaches the coordinator: the options of every command, the channel, errors by name."""

import asyncio
import functools
import inspect
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar

import grpc
import typer

from fedloom.v1.audit_pb2_grpc import AuditServiceStub
from fedloom.v1.metrics_pb2_grpc import MetricServiceStub
from fedloom.v1.runs_pb2 import GetRequest, GetResponse, ListRequest, ListSitesRequest, Run, Site
from fedloom.v1.runs_pb2_grpc import RunServiceStub
from fedloom.v1.sites_pb2_grpc import SiteServiceStub
from fedloom_common.channels import open_channel
from fedloom_common.errors import BadSpec, Unreachable
from fedloom_common.identity import Peer, Role
from fedloom_common.rpc import error_of
from fedloom_common.settings import load_settings
from fedloom_common.transfer import TransferStub
from fedloom_server.console.config import OperatorConfig
from fedloom_server.console.formats import plain

CALL_S = 120.0  # for calls that answer once: a coordinator under load is slow, a dead one is noticed sooner
DEFAULT_CONFIG = Path("operator.yaml")
ENV_PREFIX = "FEDLOOM_OPERATOR_"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Reason = Annotated[str, typer.Option(help="Why, for the record.")]

HINTS = {
    "CERTIFICATE_VERIFY_FAILED": (
        "do this certificate and the coordinator's come from the same `fedloom provision` kit?"
    ),
    "WRONG_VERSION_NUMBER": "what answers there speaks no TLS: is it the coordinator's port?",
    "Handshake read failed": (
        "something takes connections there and ends them: does the coordinator run behind it?"
    ),
}
"""What gRPC's words for a connection that failed mean to a person; the first that it says counts."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Coordinator:
    """An open channel to the coordinator, by service."""

    address: str
    runs: RunServiceStub
    transfers: TransferStub
    audit: AuditServiceStub
    sites: SiteServiceStub
    metrics: MetricServiceStub

    def errors(self) -> AbstractContextManager[None]:
        """See ``coordinator_errors``."""
        return coordinator_errors(self.address)

    async def call(self, method: Callable[..., Any], request: Any) -> Any:
        """Make a call that answers once.

        Raises:
            FederationError: what the coordinator said, or Unreachable.
        """
        with self.errors():
            return await method(request, timeout=CALL_S)

    async def call_at_length(self, method: Callable[..., Any], request: Any) -> Any:
        """Make a call that may take as long as its work does: keepalive alone tells whether the peer lives.

        Raises:
            FederationError: what the coordinator said, or Unreachable.
        """
        with self.errors():
            return await method(request)

    async def run_with_rounds(self, run_id: str) -> GetResponse:
        """A run and all of its rounds, over as many calls as they need.

        Raises:
            FederationError: what the coordinator said, or Unreachable.
        """
        whole: GetResponse = await self.call(self.runs.Get, GetRequest(run_id=run_id))
        more = whole
        while more.HasField("next_round"):
            more = await self.call(self.runs.Get, GetRequest(run_id=run_id, from_round=more.next_round))
            whole.rounds.extend(more.rounds)
        whole.ClearField("next_round")
        return whole

    async def all_runs(self) -> list[Run]:
        """Every run, newest first, over as many calls as they need.

        Raises:
            FederationError: what the coordinator said, or Unreachable.
        """
        pages = self._pages(self.runs.List, ListRequest())
        return [run async for page in pages for run in page.runs]

    async def all_sites(self) -> list[Site]:
        """Every site by name, over as many calls as they need.

        Raises:
            FederationError: what the coordinator said, or Unreachable.
        """
        pages = self._pages(self.runs.ListSites, ListSitesRequest())
        return [site async for page in pages for site in page.sites]

    async def _pages(self, method: Callable[..., Any], request: Any) -> AsyncIterator[Any]:
        """The answers of a method whose requests say after what to go on."""
        while True:
            page = await self.call(method, request)
            yield page
            if not page.next_after:
                return
            request.after = page.next_after


@dataclass(frozen=True, kw_only=True)
class Operator:
    """Where the coordinator is and who asks, as the command line has it; ``connect`` reads the files."""

    config: Path | None
    flags: tuple[str, ...] = ()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Coordinator]:
        """Open the channel.

        Raises:
            BadSpec: the settings or certificates have mistakes, or are missing.
            NotPermitted: a name in clear for a coordinator that may be on another machine.
        """
        settings = self._settings()
        insecure = Peer(Role.OPERATOR, settings.insecure) if settings.insecure else None
        async with open_channel(settings.coordinator, settings.tls, insecure) as channel:
            yield Coordinator(
                address=settings.coordinator,
                runs=RunServiceStub(channel),
                transfers=TransferStub(channel),
                audit=AuditServiceStub(channel),
                sites=SiteServiceStub(channel),
                metrics=MetricServiceStub(channel),
            )

    def _settings(self) -> OperatorConfig:
        file = self.config
        if file is None and DEFAULT_CONFIG.exists():
            file = DEFAULT_CONFIG
        nowhere = "--coordinator" not in self.flags and f"{ENV_PREFIX}COORDINATOR" not in os.environ
        if file is None and nowhere:
            raise BadSpec(
                f"nothing says where the coordinator is: give --config FILE ({DEFAULT_CONFIG} is not in this "
                f"folder), --coordinator host:port, or set {ENV_PREFIX}CONFIG or {ENV_PREFIX}COORDINATOR"
            )
        return load_settings(OperatorConfig, file, env_prefix=ENV_PREFIX, flags=self.flags)


@contextmanager
def coordinator_errors(address: str) -> Iterator[None]:
    """Turn every gRPC error inside into the FederationError that it stands for, fit for a terminal.

    Raises:
        FederationError: of the class that the coordinator raised, with its text.
    """
    try:
        yield
    except grpc.RpcError as error:
        known = error_of(error, f"the coordinator at {address}")
        if isinstance(known, Unreachable):
            raise Unreachable(_no_answer(address, error.code(), plain(error.details() or ""))) from error
        raise type(known)(plain(str(known))) from error


def operator_command(
    app: typer.Typer, name: str
) -> Callable[[Callable[Concatenate[Operator, P], Coroutine[Any, Any, T]]], Callable[P, T]]:
    """Register a coroutine function as a command that also has the options of ``_common_options``.

    The coroutine function gets the Operator that these make as its first argument.
    """

    def register(command: Callable[Concatenate[Operator, P], Coroutine[Any, Any, T]]) -> Callable[P, T]:
        common = inspect.signature(_common_options).parameters

        def run(*args: Any, **values: Any) -> T:
            operator = _common_options(**{option: values.pop(option) for option in common})
            try:
                return asyncio.run(command(operator, *args, **values))
            except KeyboardInterrupt:
                raise typer.Exit(130) from None  # as shells do; older typers exit with 1

        own = list(inspect.signature(command).parameters.values())[1:]
        functools.update_wrapper(run, command)
        # typer reads the signature and the type hints, and must find the common options in both
        run.__signature__ = inspect.Signature([*own, *common.values()])  # type: ignore[attr-defined]
        run.__annotations__ = {option.name: option.annotation for option in (*own, *common.values())}
        return app.command(name)(run)

    return register


def _no_answer(address: str, code: grpc.StatusCode, details: str) -> str:
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        return f"the coordinator at {address} failed: {details}"
    hints = (f" ({hint})" for words, hint in HINTS.items() if words in details)
    return f"no coordinator answers at {address}: {details}{next(hints, '')}"


PANEL = "Coordinator"


def _option(flag: str, text: str, metavar: str | None = None) -> Any:
    variable = ENV_PREFIX + flag.removeprefix("--").upper().replace(".", "__")
    return typer.Option(flag, envvar=variable, metavar=metavar, help=text, rich_help_panel=PANEL)


CONFIG = _option("--config", f"Operator's config; ./{DEFAULT_CONFIG} if it exists.")
ADDRESS = _option("--coordinator", "host:port of the coordinator.")
INSECURE = _option("--insecure", "Instead of certificates, on one machine: a name sent in clear.", "NAME")
CA = _option("--tls.ca", "Certificate of the federation's CA.")
CERTIFICATE = _option("--tls.certificate", "Operator's certificate.")
KEY = _option("--tls.key", "Key of the operator's certificate.")


def _common_options(
    *,
    config: Annotated[Path | None, CONFIG] = None,
    coordinator: Annotated[str | None, ADDRESS] = None,
    insecure: Annotated[str | None, INSECURE] = None,
    tls_ca: Annotated[Path | None, CA] = None,
    tls_certificate: Annotated[Path | None, CERTIFICATE] = None,
    tls_key: Annotated[Path | None, KEY] = None,
) -> Operator:
    given = {
        "--coordinator": coordinator,
        "--insecure": insecure,
        "--tls.ca": tls_ca,
        "--tls.certificate": tls_certificate,
        "--tls.key": tls_key,
    }
    flags = [part for flag, value in given.items() if value is not None for part in (flag, str(value))]
    return Operator(config=config, flags=tuple(flags))
