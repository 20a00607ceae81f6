"""Where sites report how far they are in a round, and can be held until all of them have come as far.

The benchmark listens on a Unix socket, each site's process connects: a line of JSON there, a line back.
"""

import asyncio
import json
import socketserver
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HELD_S = 900.0
HAS_MODEL, HAS_UPDATE = "has model", "has update"


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A site that has come to a point of a round."""

    site: str
    round: int
    point: str
    model: str
    """Path of the model that it trains from."""
    cpu_s: float
    """CPU time of its null training; 0 before."""
    at_s: float


class Gate:
    """The benchmark's end."""

    def __init__(
        self,
        path: Path,
        *,
        sites: int,
        in_step: Callable[[int], bool],
        on_arrival: Callable[[Arrival], None] = lambda _: None,
    ) -> None:
        """``in_step`` tells in which rounds sites wait for each other.

        ``on_arrival`` hears of each arrival before its site goes on.
        """
        self.path = path
        self.arrivals: list[Arrival] = []
        self._sites = sites
        self._in_step = in_step
        self._on_arrival = on_arrival
        self._barriers: dict[tuple[int, str], threading.Barrier] = {}
        self._lock = threading.Lock()
        self._server = _Server(str(path), _Visit)
        self._server.gate = self
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "Gate":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for barrier in self._barriers.values():
            barrier.abort()

    def last_arrival_s(self, round_number: int, point: str) -> float:
        """When the last site came to a point."""
        return max(a.at_s for a in self.arrivals if a.round == round_number and a.point == point)

    def null_cpu_s(self, round_number: int) -> float:
        """CPU time that the sites' null training took in a round, all together."""
        return sum(a.cpu_s for a in self.arrivals if a.round == round_number)

    def _arrive(self, arrival: Arrival) -> None:
        with self._lock:
            self.arrivals.append(arrival)
            self._on_arrival(arrival)
            place = arrival.round, arrival.point
            barrier = self._barriers.setdefault(place, threading.Barrier(self._sites))
        if self._in_step(arrival.round):
            barrier.wait(HELD_S)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 128  # sites that connect at once: beyond it a connection fails
    block_on_close = False
    gate: Gate


class _Visit(socketserver.StreamRequestHandler):
    """One site, for as long as its process lives."""

    server: _Server

    def handle(self) -> None:
        for line in self.rfile:
            self.server.gate._arrive(Arrival(**json.loads(line), at_s=time.time()))
            self.wfile.write(b"go\n")


class Visitor:
    """A site's end."""

    def __init__(self, path: Path, site: str) -> None:
        self._path = path
        self._site = site
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def arrive(self, round_number: int, point: str, *, model: Path, cpu_s: float = 0.0) -> None:
        """Report a point, and wait for leave to go on."""
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(self._path)
        reader, writer = self._streams
        facts = {
            "site": self._site, "round": round_number, "point": point, "model": str(model), "cpu_s": cpu_s,
        }  # fmt: skip
        writer.write(json.dumps(facts).encode() + b"\n")
        if await reader.readline() != b"go\n":
            raise ConnectionError(f"the benchmark at {self._path} is gone")

    def close(self) -> None:
        """Leave."""
        if self._streams is not None:
            self._streams[1].close()
