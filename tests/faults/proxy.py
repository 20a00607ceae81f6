"""A TCP proxy that does to connections what networks do: cut, delay, flip a bit, swallow everything."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Self

PIECE_BYTES = 1 << 16
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Way(Enum):
    """A direction."""

    UP = auto()
    """From the site to the coordinator."""
    DOWN = auto()


class Fault(Enum):
    """What happens at a byte."""

    RESET = auto()
    """Both ends get RST, which may overtake what is still on its way."""
    END = auto()
    """Both ends get FIN, as from a middlebox that is restarted in good order."""
    FLIP = auto()
    """The byte's lowest bit is flipped."""
    BLACKHOLE = auto()
    """Neither way carries anything from here on, and nobody is told."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A fault at a place in the stream of all bytes that are forwarded one way, whatever the connection."""

    way: Way
    at_bytes: int
    fault: Fault


class _Connection:
    """The two sockets of one connection."""

    def __init__(self, site: asyncio.StreamWriter, coordinator: asyncio.StreamWriter) -> None:
        self.ends = (site, coordinator)
        self.is_swallowed = False

    def cut(self, *, reset: bool) -> None:
        for end in self.ends:
            peer = end.get_extra_info("socket")
            if reset and peer is not None and peer.fileno() >= 0:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                end.transport.abort()
            else:
                end.close()


class Proxy:
    """Forwards from ``port`` to a coordinator, with faults at the places of a plan."""

    def __init__(self, target_port: int, plans: Sequence[Plan] = (), *, delay_s: float = 0.0) -> None:
        """``delay_s`` is how much later each piece arrives, as on a long line."""
        self.target_port = target_port
        self.port = 0
        self.forwarded_bytes = dict.fromkeys(Way, 0)
        self.delay_s = delay_s
        self.done: list[Plan] = []
        self._plans = {
            way: sorted((p for p in plans if p.way is way), key=lambda p: p.at_bytes) for way in Way
        }
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=PIECE_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.cut(reset=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def plan(self, *plans: Plan) -> None:
        """Add faults; a place that is passed already means the next byte."""
        for way in Way:
            added = [plan for plan in plans if plan.way is way]
            self._plans[way] = sorted([*self._plans[way], *added], key=lambda plan: plan.at_bytes)

    def cut(self, *, reset: bool) -> None:
        """End every connection now: by RST, or by FIN."""
        for connection in list(self._connections):
            connection.cut(reset=reset)

    def swallow(self) -> None:
        """Have every present connection carry nothing from here on, and tell nobody; new ones are well."""
        for connection in self._connections:
            connection.is_swallowed = True

    def _accept(self, from_site: asyncio.StreamReader, to_site: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(from_site, to_site))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, from_site: asyncio.StreamReader, to_site: asyncio.StreamWriter) -> None:
        try:
            from_coordinator, to_coordinator = await asyncio.open_connection(
                "127.0.0.1", self.target_port, limit=PIECE_BYTES
            )
        except OSError:
            to_site.close()
            return
        connection = _Connection(to_site, to_coordinator)
        self._connections.add(connection)
        for end in connection.ends:
            end.transport.set_write_buffer_limits(high=0)  # what counts as forwarded is the kernel's
        try:
            await asyncio.gather(
                self._forward(connection, Way.UP, from_site, to_coordinator),
                self._forward(connection, Way.DOWN, from_coordinator, to_site),
            )
        finally:
            connection.cut(reset=False)
            self._connections.discard(connection)

    async def _forward(
        self, connection: _Connection, way: Way, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):  # an end has gone
            async for piece in _pieces(source):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if connection.is_swallowed:
                    continue
                if not await self._pass_on(connection, way, piece, sink):
                    return
            if not connection.is_swallowed and not sink.is_closing():
                sink.write_eof()

    async def _pass_on(
        self, connection: _Connection, way: Way, piece: bytes, sink: asyncio.StreamWriter
    ) -> bool:
        """Forward a piece with the faults that are due in it; False if it was the connection's last."""
        plans = self._plans[way]
        while plans and plans[0].at_bytes < self.forwarded_bytes[way] + len(piece):
            plan = plans.pop(0)
            place = max(0, plan.at_bytes - self.forwarded_bytes[way])
            self.done.append(plan)
            if plan.fault is Fault.FLIP:
                piece = piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :]
                continue
            await self._send(way, piece[:place], sink)
            if plan.fault is Fault.BLACKHOLE:
                connection.is_swallowed = True
                return True

            connection.cut(reset=plan.fault is Fault.RESET)
            return False
        await self._send(way, piece, sink)
        return True

    async def _send(self, way: Way, piece: bytes, sink: asyncio.StreamWriter) -> None:
        if piece:
            self.forwarded_bytes[way] += len(piece)
            sink.write(piece)
            await sink.drain()


async def _pieces(source: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await source.read(PIECE_BYTES):
        yield piece
