"""Who may call what, checked for every call by one table, and errors on their way out.

Handlers behind this see only peers that their method admits, and raise
FederationErrors; any other exception leaves as an error without its text.
"""

import inspect
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from fedloom_common.errors import FederationError, NotPermitted, ProtocolError, TooManyCalls
from fedloom_common.identity import Peer, Role, insecure_peer, peer_of
from fedloom_common.rpc import status_of
from fedloom_server.rpc.calls import Calls

OPERATORS = frozenset({Role.OPERATOR})
READERS = frozenset({Role.OPERATOR, Role.VIEWER})
SITES = frozenset({Role.SITE})
ALL = frozenset(Role)

ADMITTED: Mapping[str, frozenset[Role]] = {
    "/fedloom.v1.FederationService/Attach": SITES,
    "/fedloom.v1.TransferService/Read": SITES | READERS,
    "/fedloom.v1.TransferService/Write": SITES,
    "/fedloom.v1.TransferService/QueryWrite": SITES,
    "/fedloom.v1.RunService/Submit": OPERATORS,
    "/fedloom.v1.RunService/Stop": OPERATORS,
    "/fedloom.v1.RunService/Resume": OPERATORS,
    "/fedloom.v1.RunService/List": READERS,
    "/fedloom.v1.RunService/Get": READERS,
    "/fedloom.v1.RunService/Watch": READERS,
    "/fedloom.v1.RunService/Export": READERS,
    "/fedloom.v1.RunService/ListSites": READERS,
    "/fedloom.v1.AuditService/List": READERS,
    "/fedloom.v1.SiteService/Get": READERS,
    "/fedloom.v1.SiteService/Drain": OPERATORS,
    "/fedloom.v1.SiteService/Undrain": OPERATORS,
    "/fedloom.v1.SiteService/Block": OPERATORS,
    "/fedloom.v1.SiteService/Unblock": OPERATORS,
    "/fedloom.v1.SiteService/Forget": OPERATORS,
    "/fedloom.v1.SiteService/Label": OPERATORS,
    "/grpc.health.v1.Health/Check": ALL,
    "/grpc.health.v1.Health/Watch": ALL,
    "/grpc.health.v1.Health/List": ALL,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": ALL,
}

CALLS_OF_A_PEER = 64  # a session, transfers, some watchers; each may hold a file and a chunk in memory

logger = logging.getLogger(__name__)


class Access:
    """Tells who calls."""

    def __init__(self, *, insecure: bool, refusal: Callable[[str], str | None]) -> None:
        """``refusal`` says why a site, by name, may not call at all; None if it may."""
        self._insecure = insecure
        self._refusal = refusal

    def peer(self, context: grpc.aio.ServicerContext[Any, Any]) -> Peer:
        """The caller, by certificate; where certificates are switched off, by what it says.

        Raises:
            NotPermitted: the certificate does not name exactly one peer.
        """
        if self._insecure:
            return insecure_peer(context.invocation_metadata() or ())
        return peer_of(context.auth_context())

    def admit(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> Peer:
        """The caller, if the table admits it to a method.

        Raises:
            NotPermitted: it does not, or the caller is a site that is blocked.
        """
        peer = self.peer(context)
        if peer.role not in ADMITTED.get(method, frozenset()):
            raise NotPermitted(f"{peer.role} {peer.name} may not call {method}")
        if peer.role is Role.SITE and (refusal := self._refusal(peer.name)) is not None:
            raise NotPermitted(refusal)
        return peer


class Load:
    """Calls under way by peer: one that opens more than a share of them is refused."""

    def __init__(self) -> None:
        self._calls: Counter[Peer] = Counter()

    @contextmanager
    def counted(self, peer: Peer) -> Iterator[None]:
        """Count a call while it is under way.

        Raises:
            TooManyCalls: the peer has CALLS_OF_A_PEER under way.
        """
        if self._calls[peer] >= CALLS_OF_A_PEER:
            raise TooManyCalls(
                f"{peer.role} {peer.name} has {CALLS_OF_A_PEER} calls under way; end some first"
            )
        self._calls[peer] += 1
        try:
            yield
        finally:
            self._calls[peer] -= 1
            if not self._calls[peer]:
                del self._calls[peer]


class Guard(grpc.aio.ServerInterceptor):
    """Puts the table before, and the mapping of errors behind, every handler."""

    def __init__(self, access: Access, calls: Calls) -> None:
        self._access = access
        self._calls = calls
        self._load = Load()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        kind, behaviour = _behaviour(handler)
        wrap = self._streaming if handler.response_streaming else self._single
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(wrap(method, behaviour), handler.request_deserializer, handler.response_serializer)

    def _single(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                peer = self._access.admit(method, context)
                with self._calls.counted(method), self._load.counted(peer):
                    return await behaviour(request, context)
            except Exception as error:  # noqa: BLE001 (the process's edge)
                await _abort(method, error, context)

        return handle

    def _streaming(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                peer = self._access.admit(method, context)
                with self._calls.counted(method), self._load.counted(peer):
                    if inspect.isasyncgenfunction(behaviour):
                        async for response in behaviour(request, context):
                            yield response
                    else:
                        await behaviour(request, context)  # it writes to the context
            except Exception as error:  # noqa: BLE001 (the process's edge)
                await _abort(method, error, context)

        return handle


def _behaviour(handler: Any) -> tuple[str, Callable[..., Any]]:
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        behaviour = getattr(handler, kind)
        if behaviour is not None:
            return kind, behaviour
    raise AssertionError("a handler has exactly one behaviour")


async def _abort(method: str, error: Exception, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """End a call with an error's status; the text of errors that are not ours stays in our log."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, DecodeError):
        error = ProtocolError("the message is not of the contract: its bytes cannot be decoded")
    if isinstance(error, FederationError):
        logger.warning(
            "call refused", extra={"method": method, "caller": context.peer(), "reason": str(error)}
        )
        code, text, metadata = status_of(error)
        await context.abort(code, text, metadata)
    logger.error("call failed", extra={"method": method, "caller": context.peer()}, exc_info=error)
    ours = FederationError("internal error; the coordinator's log has its cause")
    await context.abort(*status_of(ours))
