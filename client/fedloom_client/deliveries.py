"""Uploading finished trainings until the coordinator has each of them, whatever breaks on the way."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from fedloom.v1.transfer_pb2 import QueryWriteRequest
from fedloom_client.backoff import Backoff
from fedloom_client.messages import Progress
from fedloom_client.outbox import Finished, Outbox
from fedloom_common.errors import BadChunk, BadSpec, FederationError, NeverRetry, NotIdentified, ProtocolError
from fedloom_common.pace import Pace
from fedloom_common.rpc import federation_errors
from fedloom_common.transfer import TransferStub, upload

CORRUPT_LIMIT = 5  # a chunk that fails its checksum so often in one place is not the line's fault
QUERY_TIMEOUT_S = 20.0

logger = logging.getLogger(__name__)


@dataclass
class _Delivery:
    entry: Finished
    upload: str
    offset: int
    """Bytes that the coordinator holds, as far as is known."""
    nudge: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the coordinator is back: the pause between tries need not be waited out."""
    task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.entry.outcome.assignment_id


class Deliveries:
    """The uploads under way."""

    def __init__(
        self,
        connect: Callable[[], grpc.aio.Channel],
        *,
        outbox: Outbox,
        report: Callable[[Progress], None],
        on_failure: Callable[[str, str], None],
        pace: Pace,
    ) -> None:
        """``on_failure`` hears of an assignment whose update is given up here, and why."""
        self._connect = connect
        self._outbox = outbox
        self._report = report
        self._on_failure = on_failure
        self._pace = pace
        self._under_way: dict[str, _Delivery] = {}

    def begin(self, assignment_id: str, upload_name: str, offset: int) -> None:
        """Upload a finished training from an offset; if that is under way already, it goes on."""
        entry = self._outbox.get(assignment_id)
        if entry is None:
            logger.warning("leave to upload what is not here", extra={"assignment": assignment_id})
            return
        known = self._under_way.get(assignment_id)
        if known is not None and known.upload == upload_name:
            known.nudge.set()
            return
        self.withdraw(assignment_id)
        delivery = _Delivery(entry, upload_name, offset)
        self._under_way[assignment_id] = delivery
        delivery.task = asyncio.create_task(self._deliver(delivery))

    def is_under_way(self, assignment_id: str) -> bool:
        """Whether the coordinator has given leave to upload, and what becomes of it is yet to be heard."""
        return assignment_id in self._under_way

    def withdraw(self, assignment_id: str) -> None:
        """Stop an upload."""
        delivery = self._under_way.pop(assignment_id, None)
        if delivery is not None and delivery.task is not None:
            delivery.task.cancel()

    async def stop(self) -> None:
        """Stop all uploads; what they were sending stays in the outbox."""
        tasks = [delivery.task for delivery in self._under_way.values() if delivery.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _deliver(self, delivery: _Delivery) -> None:
        began_s = time.monotonic()
        facts = {"assignment": delivery.name, "update_bytes": delivery.entry.outcome.update_bytes}
        try:
            await self._send_until_received(delivery)
            self._outbox.delivered(delivery.name)
            seconds = round(time.monotonic() - began_s, 3)
            logger.info("update delivered", extra=facts | {"seconds": seconds})
        except BadChunk as error:  # ours to tell: the coordinator waits for another try
            logger.warning("an update is given up", extra=facts | {"reason": str(error)})
            self._outbox.remove(delivery.name)
            self._on_failure(delivery.name, f"{CORRUPT_LIMIT} uploads broke off at one place: {error}")
        except FederationError as error:
            logger.warning("the coordinator does not take an update", extra=facts | {"reason": str(error)})
            self._outbox.remove(delivery.name)
        except OSError as error:
            logger.error("an update cannot be read", extra=facts | {"error": str(error)})
            self._outbox.remove(delivery.name)
            self._on_failure(delivery.name, f"the finished update cannot be read: {error}")
        finally:
            if self._under_way.get(delivery.name) is delivery:
                del self._under_way[delivery.name]

    async def _send_until_received(self, delivery: _Delivery) -> None:
        backoff, corrupt, offset_known = Backoff(), 0, True
        told: type[FederationError] | None = None
        while True:
            delivery.nudge.clear()
            held = delivery.offset
            try:
                async with self._connect() as channel:
                    stub = TransferStub(channel)
                    if not offset_known and await _ask_offset(stub, delivery):
                        return None
                    return await self._send(stub, delivery)
            except FederationError as error:
                if delivery.offset > held:
                    backoff.reset()
                    corrupt, told = 0, None
                corrupt += isinstance(error, BadChunk)
                if _is_final(error) or corrupt == CORRUPT_LIMIT:
                    raise
                if type(error) is not told:
                    told = type(error)
                    facts = {"assignment": delivery.name, "error": str(error)}
                    logger.warning("an upload broke off; trying on", extra=facts)
            offset_known = False
            await _pause(backoff.next_s(), delivery.nudge)

    async def _send(self, stub: TransferStub, delivery: _Delivery) -> None:
        outcome = delivery.entry.outcome

        def on_bytes(done: int) -> None:
            self._report(
                Progress(assignment_id=delivery.name, phase="upload", done=done, total=outcome.update_bytes)
            )

        on_bytes(delivery.offset)
        receipt = await upload(
            stub, delivery.upload, delivery.entry.path, delivery.offset, on_bytes=on_bytes, pace=self._pace
        )
        if receipt.digest != outcome.update_digest:
            raise ProtocolError(f"the receipt is for {receipt.digest}, sent was {outcome.update_digest}")


def _is_final(error: FederationError) -> bool:
    """Whether the coordinator will never take the update; certificates at fault may be renewed."""
    return isinstance(error, NeverRetry) and not isinstance(error, BadSpec | NotIdentified)


async def _ask_offset(stub: TransferStub, delivery: _Delivery) -> bool:
    """Learn from where to go on; True if the coordinator has it all."""
    with federation_errors("the coordinator"):
        answer = await stub.query_write(QueryWriteRequest(upload=delivery.upload), timeout=QUERY_TIMEOUT_S)
    delivery.offset = answer.committed_bytes
    return bool(answer.complete)


async def _pause(seconds: float, nudge: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(seconds):
            await nudge.wait()
    except TimeoutError:
        return
