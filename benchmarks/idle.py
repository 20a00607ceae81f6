"""What attached sites cost a coordinator that has nothing for them to do: time to attach, CPU, memory.

Run by `make bench`; docs/benchmarks.md tells the method. `--quick` takes a minute, the whole a few.
"""

import asyncio
import json
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from machine import machine_facts
from measure import GB, MB
from processes import Processes, free_port, wait_for_port
from rich.console import Console

from fedloom_common.authority import Authority
from fedloom_common.identity import Role
from fedloom_server.console.connection import Operator
from fedloom_server.console.kit import create_kit

HERE = Path(__file__).resolve().parent
FEDLOOM = Path(sys.executable).with_name("fedloom")
PACKAGES = ("fedloom", "grpcio", "protobuf")
ATTACH_LIMIT_S = 300.0
SETTLE_S = 15.0  # what attaching leaves behind, such as rows to write
MOST_SHARE, MOST_BYTES = 0.05, 1 * GB

console = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Idle:
    """What was measured."""

    sites: int
    attach_s: float
    """From the start of the first site's process until all are attached."""
    attach_cpu_s: float
    """The coordinator's CPU seconds meanwhile."""
    idle_s: float
    share: float
    """Of one core, over ``idle_s``."""
    rss_bytes: int
    """The coordinator's resident memory at the end."""
    empty_rss_bytes: int
    """The same before the first site attached."""
    stayed: int
    """Sites still attached at the end."""

    @property
    def holds(self) -> bool:
        """Whether the coordinator keeps to what is asked of it."""
        return self.stayed == self.sites and self.share < MOST_SHARE and self.rss_bytes < MOST_BYTES


def measure(sites: int, processes_of_sites: int, idle_s: float, folder: Path) -> Idle:
    """Attach sites to a new coordinator, and then do nothing."""
    port, kit = free_port(), folder / "kit"
    made = create_kit(kit, federation="idle", hosts=["localhost"], port=port)
    made.add_operator("bench")
    _certify(kit, sites)
    with Processes(folder / "logs") as processes:
        config = kit / "coordinator/coordinator.yaml"
        listen = f"127.0.0.1:{port}"
        server = processes.start("server", [FEDLOOM, "coordinator", "--config", config, "--listen", listen])
        wait_for_port(port, processes)
        coordinator = psutil.Process(server.pid)
        empty_rss_bytes, before_s, began_s = _rss(coordinator), _cpu_s(coordinator), time.monotonic()
        _start_sites(processes, kit, f"localhost:{port}", sites, processes_of_sites)
        asyncio.run(_until_attached(kit, sites, processes))
        attach_s, attach_cpu_s = time.monotonic() - began_s, _cpu_s(coordinator) - before_s
        console.log(f"{sites} sites attached in {attach_s:.1f} s")
        time.sleep(SETTLE_S)
        before_s, began_s = _cpu_s(coordinator), time.monotonic()
        time.sleep(idle_s)
        spent_s, passed_s = _cpu_s(coordinator) - before_s, time.monotonic() - began_s
        rss_bytes, stayed = _rss(coordinator), asyncio.run(_attached(kit))
    return Idle(
        sites=sites, attach_s=attach_s, attach_cpu_s=attach_cpu_s, idle_s=passed_s, share=spent_s / passed_s,
        rss_bytes=rss_bytes, empty_rss_bytes=empty_rss_bytes, stayed=stayed,
    )  # fmt: skip


def _certify(kit: Path, sites: int) -> None:
    """Certificates alone: a site's folder of `fedloom provision` has more than is needed here."""
    authority = Authority.load(kit / "ca")
    for number in range(sites):
        folder = kit / "sites" / f"site-{number}"
        folder.mkdir(parents=True)
        authority.issue(Role.SITE, folder.name).save(folder / "site.crt", folder / "site.key")


def _start_sites(processes: Processes, kit: Path, address: str, sites: int, count: int) -> None:
    each = -(-sites // count)
    for first in range(0, sites, each):
        command = [
            sys.executable,
            HERE / "idlesites.py",
            kit,
            address,
            str(first),
            str(min(each, sites - first)),
        ]
        processes.start(f"sites-{first}", command)


async def _until_attached(kit: Path, sites: int, processes: Processes) -> None:
    async with asyncio.timeout(ATTACH_LIMIT_S):
        while await _attached(kit) < sites:
            processes.require_alive()
            await asyncio.sleep(1)  # a call lists every site: more of them would be measured too


async def _attached(kit: Path) -> int:
    operator = Operator(config=kit / "operators/bench/operator.yaml")
    async with operator.connect() as coordinator:
        return sum(site.connected for site in await coordinator.all_sites())


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _rss(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def main(
    sites: Annotated[int, typer.Option(min=1, help="Sites that attach.")] = 1000,
    processes: Annotated[int, typer.Option(min=1, help="Processes that hold them.")] = 4,
    idle_s: Annotated[float, typer.Option(min=1, help="Seconds to measure.")] = 60,
    quick: Annotated[bool, typer.Option("--quick", help="200 sites, 20 seconds.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="File for the figures as JSON.")] = None,
) -> None:
    """Measure a coordinator with many attached sites and no run; fails if they cost more than they may."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end what was started, as Ctrl-C does
    facts = machine_facts(PACKAGES)
    with tempfile.TemporaryDirectory(prefix="fedloom-idle-") as folder:
        found = measure(200 if quick else sites, processes, 20 if quick else idle_s, Path(folder))
    if output is not None:
        output.write_text(json.dumps({"machine": facts, "idle": asdict(found)}, indent=2) + "\n")
    print(
        f"{found.sites} sites attached in {found.attach_s:.1f} s ({found.attach_cpu_s:.1f} CPU seconds "
        f"of the coordinator); then over {found.idle_s:.0f} s {found.share:.1%} of a core (wanted: below "
        f"{MOST_SHARE:.0%}), {found.rss_bytes / MB:.0f} MB resident (wanted: below {MOST_BYTES / MB:.0f} MB; "
        f"{found.empty_rss_bytes / MB:.0f} MB without sites), {found.stayed} sites still attached"
    )
    if not found.holds:
        raise SystemExit("the coordinator does not hold so many idle sites at that cost")


if __name__ == "__main__":
    typer.run(main)
