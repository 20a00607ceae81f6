"""What stands before and behind every handler: the table, the caps, the audit log, the mapping of errors.

Handlers behind this see only peers that their method admits and messages of bounded size, and raise
FederationErrors; any other exception leaves as an error without its text.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, contextmanager
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError, Message

from fedloom_common.bursts import Bursts, untold_fact
from fedloom_common.errors import FederationError, NotPermitted, ProtocolError, TooManyCalls
from fedloom_common.identity import Peer, Role
from fedloom_common.pace import Pace
from fedloom_common.rpc import TIME_KEY, status_of
from fedloom_server.audit import AuditLog
from fedloom_server.rpc.access import NOBODY, TABLE, Access, Context, Rule
from fedloom_server.rpc.calls import Calls
from fedloom_server.rpc.caps import LINES_AT_ONCE, LINES_PER_S, Caps
from fedloom_server.rpc.endings import Endings

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
REQUEST_S = 30.0  # a mebibyte, the largest, at 280 kbit/s; who dawdles longer keeps one of its calls busy
LOST_S = 1.0  # gRPC tells of a broken line in one turn of the loop or two
Handler = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]

logger = logging.getLogger(__name__)


class Guard(grpc.aio.ServerInterceptor):
    """Puts the table before, and the mapping of errors behind, every handler."""

    def __init__(self, access: Access, caps: Caps, calls: Calls, endings: Endings, log: AuditLog) -> None:
        self._access = access
        self._caps = caps
        self._calls = calls
        self._endings = endings
        self._log = log
        self._refusals = Bursts(LINES_PER_S, LINES_AT_ONCE)

    async def intercept_service(
        self, continuation: Handler, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        call = _Call(handler_call_details.method, handler, _behaviour(handler))
        # As if every request were a stream, of bytes: gRPC would otherwise take a single one in, at its
        # sender's leisure, before it asks us. So nothing is held or decoded for who is not admitted.
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(call), None, handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(self._single(call), None, handler.response_serializer)

    def _single(self, call: "_Call") -> Callable[..., Any]:
        async def handle(raw: Any, context: Context) -> Any:
            try:
                with self._admitted(call, context) as peer:
                    if call.method == HEALTH_CHECK:  # by which `fedloom doctor` compares the clocks
                        context.set_trailing_metadata(((TIME_KEY, f"{time.time():.3f}"),))
                    return await call.behaviour(await self._request(call, peer, raw), context)
            except Exception as error:  # noqa: BLE001 (the process's edge)
                await self._abort(call, error, context)

        return handle

    def _streaming(self, call: "_Call") -> Callable[..., Any]:
        async def handle(raw: Any, context: Context) -> None:
            try:
                with self._admitted(call, context) as peer:
                    request = await self._request(call, peer, raw)
                    await _send_headers(context)
                    if inspect.isasyncgenfunction(call.behaviour):
                        async with aclosing(call.behaviour(request, context)) as responses:
                            async for response in responses:
                                await context.write(response)
                    else:
                        await call.behaviour(request, context)  # it writes to the context
            except Exception as error:  # noqa: BLE001 (the process's edge)
                await self._abort(call, error, context)

        return handle

    @contextmanager
    def _admitted(self, call: "_Call", context: Context) -> Any:
        peer = self._access.admit(call.method, context)
        with (
            self._calls.counted(call.method),
            self._caps.counted(call.method, peer),
            self._endings.possible(context),
        ):
            yield peer

    async def _request(self, call: "_Call", peer: Peer, raw: AsyncIterator[bytes]) -> Any:
        """What the handler is to see: the message, or the stream of them."""
        if call.is_stream:
            return _Messages(call, raw, self._caps.pace() if call.rule.is_paced else Pace(None))
        request = call.decode(await _single_message(raw))
        if call.rule.audited and peer.role is not Role.SITE:
            # Before it is done: nothing that an operator does goes unrecorded, even if we are killed now.
            record = self._log.audit if peer.role is Role.OPERATOR else self._log.audit_often
            details = _details(request)
            record(peer, call.rule.audited, str(details.pop(call.rule.subject, "")), **details)
        return request

    async def _abort(self, call: "_Call", error: Exception, context: Context) -> None:
        """End a call with an error's status; the text of errors that are not ours stays in our log."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, FederationError):
            self._note(call, error, context)
            code, text, metadata = status_of(error)
            await context.abort(code, text, metadata)
        facts = {"method": call.method, "caller": context.peer()}
        if isinstance(error, grpc.aio.InternalError):  # a message could not be sent
            await _until_lost(facts)
        logger.error("call failed", extra=facts, exc_info=error)
        ours = FederationError("internal error; the coordinator's log has its cause")
        await context.abort(*status_of(ours))

    def _note(self, call: "_Call", error: FederationError, context: Context) -> None:
        try:
            who: object = self._access.peer(context)
        except NotPermitted:
            who = f"unknown at {_host_of(context.peer())}"
        facts = {"method": call.method, "caller": context.peer(), "reason": str(error)}
        if (untold := self._refusals.untold(str(who))) is not None:
            logger.warning("call refused", extra=facts | {"peer": str(who)} | untold_fact(untold))
        if isinstance(error, NotPermitted | TooManyCalls):
            action = "call.refused"
        elif call.rule.audited and isinstance(who, Peer) and who.role is not Role.SITE:
            action = f"{call.rule.audited}.failed"
        else:
            return
        self._log.audit_often(who, action, call.method, caller=context.peer(), reason=str(error))


def _host_of(caller: str) -> str:
    """The address in "ipv6:%5B::1%5D:40902", without the port, which is another for each connection."""
    return unquote(caller).partition(":")[2].rpartition(":")[0].strip("[]") or caller


class _Call:
    """One method: its handler and its rule."""

    def __init__(self, method: str, handler: Any, behaviour: Callable[..., Any]) -> None:
        self.method = method
        self.behaviour = behaviour
        self.is_stream: bool = handler.request_streaming
        self.rule: Rule = TABLE.get(method, NOBODY)
        self._deserialize: Callable[[bytes], Any] = handler.request_deserializer or (lambda raw: raw)

    def decode(self, raw: bytes) -> Any:
        """A message, once its size is found to be allowed.

        Raises:
            ProtocolError: it is too large, or not of the contract.
        """
        if len(raw) > self.rule.request_bytes:
            raise ProtocolError(
                f"a message of {len(raw)} bytes came, {self.method} takes at most {self.rule.request_bytes}"
            )
        try:
            return self._deserialize(raw)
        except DecodeError as error:
            raise ProtocolError("the message is not of the contract: its bytes cannot be decoded") from error


class _Messages:
    """The messages of a stream, decoded one by one, and read no faster than their pace."""

    def __init__(self, call: _Call, raw: AsyncIterator[bytes], pace: Pace) -> None:
        self._call = call
        self._raw = raw  # not yet iterated: gRPC complains of an iterator that a call never came to read
        self._pace = pace

    def __aiter__(self) -> "_Messages":
        return self

    async def __anext__(self) -> Any:
        await self._pace.take(1)  # what is not read fills the stream's window: the sender has to wait
        return self._call.decode(await anext(self._raw))


async def _send_headers(context: Context) -> None:
    """Send a call's headers, whole, before its first message.

    They would else go with that message; and if the call is ended while it waits for its peer to read, gRPC
    would want to send them again before the status, fail, and leave the peer without an end.
    """
    sending = asyncio.ensure_future(context.send_initial_metadata(()))
    try:
        await asyncio.shield(sending)
    except asyncio.CancelledError:
        await asyncio.gather(sending, return_exceptions=True)  # it fails on a line that has broken
        raise


async def _until_lost(facts: dict[str, str]) -> None:
    """Let gRPC cancel a call whose line broke, as it is about to; returns if it does not."""
    try:
        await asyncio.sleep(LOST_S)
    except asyncio.CancelledError:
        logger.info("the line broke while a message was sent", extra=facts)
        raise


async def _single_message(raw: AsyncIterator[bytes]) -> bytes:
    """The only message of a call.

    Raises:
        ProtocolError: it does not come, or not in time.
    """
    try:
        return await asyncio.wait_for(anext(raw), REQUEST_S)
    except StopAsyncIteration:
        raise ProtocolError("the call has a message; none came") from None
    except TimeoutError:
        raise ProtocolError(f"the call has a message; it did not come whole in {REQUEST_S:g} s") from None


def _behaviour(handler: Any) -> Callable[..., Any]:
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        behaviour: Callable[..., Any] | None = getattr(handler, kind)
        if behaviour is not None:
            return behaviour
    raise AssertionError("a handler has exactly one behaviour")


def _details(request: Message) -> dict[str, Any]:
    """A request's own facts; of long texts, such as a run spec, their SHA-256."""
    details: dict[str, Any] = {}
    for field, value in request.ListFields():
        if field.message_type is None:
            details[field.name] = list(value) if field.is_repeated else value
        elif field.message_type.GetOptions().map_entry:
            details[field.name] = dict(value)
    if isinstance(spec := details.pop("spec", None), str):
        details["spec_sha256"] = sha256(spec.encode()).hexdigest()
    return details
