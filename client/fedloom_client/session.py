"""The connection to the coordinator: attached for ever, over any number of sessions.

Work does not live here: it goes on while there is no session, and its results go over the next one.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import NoReturn, Protocol

import grpc

from fedloom.v1 import session_pb2 as pb
from fedloom.v1.session_pb2_grpc import FederationServiceStub
from fedloom_client import wire
from fedloom_client.backoff import Backoff
from fedloom_client.mailbox import Mailbox
from fedloom_client.messages import Assignment
from fedloom_client.status import Status
from fedloom_common.errors import (
    FederationError,
    NeverRetry,
    NotIdentified,
    NotPermitted,
    ProtocolError,
    Unreachable,
)
from fedloom_common.rpc import error_of

WELCOME_S = 30.0  # a coordinator that takes a connection and does not answer for so long hangs
STEADY_S = 10.0  # a shorter session is a failed try: two daemons with one certificate displace each other
REMINDER_S = 600.0  # the log says again that there is no session

Answers = AsyncIterator[pb.CoordinatorMessage]

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Whoever does what the coordinator asks."""

    def attached(self) -> None: ...

    def detached(self) -> None: ...

    def receive(self, assignment: Assignment) -> None: ...

    def fail(self, assignment_id: str, reason: str) -> None: ...

    def grant(self, assignment_id: str, upload: str, offset: int) -> None: ...

    def cancel(self, assignment_id: str, reason: str, *, counts: bool) -> None: ...

    def drain(self, reason: str) -> None: ...

    def end_run(self, run_id: str, *, may_resume: bool) -> None: ...


class Session:
    """Attaches, and attaches again."""

    def __init__(
        self,
        connect: Callable[[], grpc.aio.Channel],
        *,
        coordinator: str,
        introduce: Callable[[], Awaitable[pb.SiteMessage]],
        listener: Listener,
        mailbox: Mailbox,
        status: Status,
    ) -> None:
        """``introduce`` makes the Hello of a new session; ``coordinator`` says who is called, for the log."""
        self._connect = connect
        self._coordinator = coordinator
        self._introduce = introduce
        self._listener = listener
        self._mailbox = mailbox
        self._status = status
        self._life: asyncio.Timeout | None = None
        self._renewed = asyncio.Event()
        self._trouble: object = None
        self._reminded_at_s = 0.0

    async def run(self) -> NoReturn:
        """Keep a session open, until cancelled."""
        backoff = Backoff()
        while True:
            began_s = time.monotonic()
            error = await self._attach_once()
            if error is None:
                continue
            self._complain(error)
            if time.monotonic() - began_s > STEADY_S:
                backoff.reset()
            await self._pause(backoff.slowest_s() if isinstance(error, NeverRetry) else backoff.next_s())

    def renew(self) -> None:
        """End the session, and attach again at once over a new channel; work goes on meanwhile."""
        self._renewed.set()
        if self._life is not None:
            self._life.reschedule(asyncio.get_running_loop().time())

    async def _pause(self, seconds: float) -> None:
        """Wait before the next try; a new certificate is tried at once."""
        self._renewed.clear()
        with suppress(TimeoutError):  # wait_for would swallow a cancel that comes with the news
            async with asyncio.timeout(seconds):
                await self._renewed.wait()

    async def _attach_once(self) -> FederationError | None:
        """One session from beginning to end; says why it ended, None if we wanted another."""
        outgoing = _Outgoing()
        try:
            # A new channel reads the certificates anew: a renewed one is used without a restart.
            async with self._connect() as channel:
                outgoing.first(await self._introduce())
                call = FederationServiceStub(channel).Attach(outgoing.messages())
                try:
                    answers = aiter(call)
                    welcome = await self._welcome(answers)
                    with suppress(TimeoutError):  # nothing but ``renew`` gives it an end
                        async with asyncio.timeout(None) as self._life:
                            await self._converse(answers, outgoing, welcome)
                    return None
                finally:
                    self._life = None
                    outgoing.end()
                    call.cancel()
        except grpc.RpcError as error:
            return _with_advice(error_of(error, self._coordinator))
        except FederationError as error:
            return error

    async def _welcome(self, answers: Answers) -> pb.Welcome:
        try:
            async with asyncio.timeout(WELCOME_S):
                answer = await anext(answers)
        except TimeoutError:
            raise Unreachable(f"{self._coordinator} does not answer Hello within {WELCOME_S:g} s") from None
        except StopAsyncIteration:
            raise Unreachable(f"{self._coordinator} closed the session before it began") from None
        welcome = answer.welcome
        if welcome.protocol_version != wire.PROTOCOL_VERSION or not welcome.heartbeat_s > 0:
            raise ProtocolError(
                f"the coordinator speaks protocol version {welcome.protocol_version}, with a heartbeat every "
                f"{welcome.heartbeat_s:g} s; this site speaks version {wire.PROTOCOL_VERSION}: "
                "install matching releases of fedloom"
            )
        return welcome

    async def _converse(self, answers: Answers, outgoing: "_Outgoing", welcome: pb.Welcome) -> NoReturn:
        logger.info("attached", extra={"site": welcome.site, "heartbeat_s": welcome.heartbeat_s})
        self._trouble = None
        self._mailbox.open()
        self._listener.attached()
        talking = [
            asyncio.create_task(self._write(outgoing)),
            asyncio.create_task(self._beat(outgoing, welcome)),
        ]
        for task in talking:
            task.add_done_callback(lambda _: outgoing.end())
        try:
            async for message in answers:
                self._dispatch(message)
            raise Unreachable(f"{self._coordinator} closed the session")
        finally:
            self._mailbox.close()
            self._listener.detached()
            for task in talking:
                task.cancel()
            await asyncio.wait(talking)
            for task in talking:
                if not task.cancelled():
                    task.result()

    async def _write(self, outgoing: "_Outgoing") -> None:
        while True:
            for message in await self._mailbox.take():
                await outgoing.send(wire.site_message(message))

    async def _beat(self, outgoing: "_Outgoing", welcome: pb.Welcome) -> None:
        while True:
            self._status.attached(welcome.site, welcome.heartbeat_s)
            await outgoing.send(wire.heartbeat())
            await asyncio.sleep(welcome.heartbeat_s)

    def _dispatch(self, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("kind"):
            case "assignment":
                self._receive(message.assignment)
            case "upload_grant":
                grant = message.upload_grant
                self._listener.grant(grant.assignment_id, grant.upload, grant.offset)
            case "cancel":
                cancel = message.cancel
                self._listener.cancel(cancel.assignment_id, cancel.reason, counts=cancel.counts)
            case "drain":
                self._listener.drain(message.drain.reason)
            case "run_ended":
                ended = message.run_ended
                self._listener.end_run(ended.run_id, may_resume=ended.may_resume)
            case kind:
                logger.warning("the coordinator sent a message of no known kind", extra={"kind": kind})

    def _receive(self, message: pb.Assignment) -> None:
        try:
            assignment = wire.assignment_of(message)
        except ProtocolError as error:
            self._listener.fail(message.id, str(error))
        else:
            self._listener.receive(assignment)

    def _complain(self, error: FederationError) -> None:
        """Say why there is no session: once for each cause, and again after a long time."""
        self._status.detached(str(error))
        trouble = str(error) if isinstance(error, NeverRetry) else type(error)
        if trouble == self._trouble and time.monotonic() - self._reminded_at_s < REMINDER_S:
            return
        self._trouble, self._reminded_at_s = trouble, time.monotonic()
        level = logging.ERROR if isinstance(error, NeverRetry) else logging.WARNING
        logger.log(level, "not attached; trying on", extra={"reason": str(error)})


class _Outgoing:
    """Messages on their way into one session: one at a time, so that a slow line holds their senders."""

    def __init__(self) -> None:
        self._next: asyncio.Queue[pb.SiteMessage | None] = asyncio.Queue(maxsize=1)

    def first(self, message: pb.SiteMessage) -> None:
        self._next.put_nowait(message)

    async def send(self, message: pb.SiteMessage) -> None:
        await self._next.put(message)

    def end(self) -> None:
        """Let gRPC's reader of the messages finish; nothing more is sent."""
        while not self._next.empty():
            self._next.get_nowait()
        self._next.put_nowait(None)

    async def messages(self) -> AsyncIterator[pb.SiteMessage]:
        while (message := await self._next.get()) is not None:
            yield message


def _with_advice(error: FederationError) -> FederationError:
    """What gRPC said, and what a person can do about it: a failed handshake is told to nobody here."""
    if isinstance(error, Unreachable):
        advice = "see that it runs, and that this site's tls files, if any, are of its federation and current"
    elif isinstance(error, NotIdentified):
        advice = "ask who runs the federation for this site's own folder of `fedloom provision site`"
    elif isinstance(error, NotPermitted):
        advice = "ask who runs the federation"
    elif isinstance(error, NeverRetry):
        advice = "see that site and coordinator have matching releases of fedloom"
    else:
        return error
    return type(error)(f"{error}; {advice}")
