"""The floor under fedloom: bare gRPC and raw TCP that move the same bytes and do nothing else.

No disk, no checksums, no protocol: one process for the coordinator, one for each site, over loopback.
All are ready before the clock starts, so nothing of a process's start is in the figures.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bare_process import ACCUMULATING, Kind, Setting
from measure import GB, GIB, Spread
from processes import Processes, free_port

PROGRAM = Path(__file__).resolve().with_name("bare_process.py")


@dataclass(frozen=True, kw_only=True)
class Bare:
    """What came of one kind of transfer, for one number of sites."""

    kind: Kind
    model_bytes: int
    sites: int
    tls: bool
    seconds: Spread
    """Until the last site is done."""
    server_cpu_s: float
    """A transfer of all sites."""
    client_cpu_s: float
    """A transfer, all sites together."""

    @property
    def moved_gib(self) -> float:
        """Payload of a transfer of all sites."""
        return self.sites * self.model_bytes / GIB

    @property
    def gb_per_s(self) -> float:
        """Payload of all sites by the median time."""
        return self.sites * self.model_bytes / GB / self.seconds.median


class BareTransfers:
    """One kind for one number of sites; other measurements may lie between its repetitions."""

    def __init__(self, kind: Kind, *, model_bytes: int, sites: int, credentials: Path | None) -> None:
        """``credentials`` is a kit's folder with a coordinator and a site-1; without it there is no TLS."""
        self._sites = sites
        self._setting = Setting(
            kind=kind,
            model_bytes=model_bytes // 4 * 4,
            port=0,
            credentials="" if credentials is None else str(credentials),
        )
        self._seconds: list[float] = []
        self._server_cpu_s: list[float] = []
        self._client_cpu_s: list[float] = []

    def repeat(self, times: int, logs: Path) -> None:
        """Start the processes, transfer so many times after one to warm up, end them."""
        setting = self._setting.at(free_port())
        with Processes(logs) as processes:
            server = _start(processes, "server", setting)
            _hear(server, processes)
            sites = [_start(processes, f"site-{number + 1}", setting) for number in range(self._sites)]
            for site in sites:
                _hear(site, processes)
            for number in range(1 + times):
                began_s = time.monotonic()
                for site in sites:
                    _tell(site, "go")
                client_cpu_s = sum(_hear(site, processes)["cpu_s"] for site in sites)
                seconds = time.monotonic() - began_s
                _tell(server, "count")
                counted = _hear(server, processes)
                self._require_sum(counted, number + 1)
                if number:
                    self._seconds.append(seconds)
                    self._server_cpu_s.append(counted["cpu_s"])
                    self._client_cpu_s.append(client_cpu_s)

    def result(self) -> Bare:
        """All repetitions so far."""
        return Bare(
            kind=self._setting.kind,
            model_bytes=self._setting.model_bytes,
            sites=self._sites,
            tls=bool(self._setting.credentials),
            seconds=Spread.of(self._seconds),
            server_cpu_s=Spread.of(self._server_cpu_s).median,
            client_cpu_s=Spread.of(self._client_cpu_s).median,
        )

    def _require_sum(self, counted: dict[str, float], transfers: int) -> None:
        """Check that the sum of the sites' ones is right in every place."""
        wanted = transfers * self._sites
        if self._setting.kind in ACCUMULATING and not counted["low"] == counted["high"] == wanted:
            low, high = counted["low"], counted["high"]
            raise SystemExit(f"{self._setting.kind}: the sums lie in {low} … {high}, all should be {wanted}")


def _start(processes: Processes, name: str, setting: Setting) -> "subprocess.Popen[bytes]":
    """Start one process; it says a line when it is ready."""
    role = "server" if name == "server" else "site"
    return processes.start(name, [sys.executable, PROGRAM, role, setting.to_json()], talks=True)


def _tell(process: "subprocess.Popen[bytes]", word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(word.encode() + b"\n")
    process.stdin.flush()


def _hear(process: "subprocess.Popen[bytes]", processes: Processes) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.wait()
        processes.require_alive()
    facts: dict[str, Any] = json.loads(line)
    return facts
