"""Many sites in one process that attach and then only live: the daemon's own sessions, each with its channel.

Usage: idlesites.py KIT host:port FIRST COUNT
"""

import asyncio
import resource
import sys
import tempfile
from pathlib import Path

import grpc

from fedloom.v1 import session_pb2 as pb
from fedloom_client import wire
from fedloom_client.hardware import Device
from fedloom_client.mailbox import Mailbox
from fedloom_client.messages import Assignment
from fedloom_client.session import Session
from fedloom_client.status import Status
from fedloom_common.channels import open_channel
from fedloom_common.identity import TlsFiles
from fedloom_common.logs import set_up_logging


class Idle:
    """Takes no work: there is none."""

    def attached(self) -> None: ...

    def detached(self) -> None: ...

    def receive(self, assignment: Assignment) -> None: ...

    def fail(self, assignment_id: str, reason: str) -> None: ...

    def grant(self, assignment_id: str, upload: str, offset: int) -> None: ...

    def cancel(self, assignment_id: str, reason: str, *, counts: bool) -> None: ...

    def drain(self, reason: str) -> None: ...

    def end_run(self, run_id: str, *, may_resume: bool) -> None: ...


async def introduce() -> pb.SiteMessage:
    """A Hello like that of a site with a GPU."""
    return wire.hello(
        devices=[Device(kind="cuda", name="NVIDIA H100 80GB HBM3", memory_bytes=81559 << 20)],
        memory_bytes=256 << 30,
        data_sets={"texts": 1 << 30},
        labels={"ward": "icu"},
        held_digests=[],
        open_assignments=[],
        kept_runs=[],
    )


def session(kit: Path, address: str, name: str, states: Path) -> Session:
    """A site's session, with its own certificate."""
    folder = kit / "sites" / name
    tls = TlsFiles(ca=kit / "ca/ca.crt", certificate=folder / "site.crt", key=folder / "site.key")

    def connect() -> grpc.aio.Channel:
        return open_channel(address, tls, None)

    return Session(
        connect,
        coordinator=f"the coordinator at {address}",
        introduce=introduce,
        listener=Idle(),
        mailbox=Mailbox(),
        status=Status(states / f"{name}.json"),
    )


async def attend(kit: Path, address: str, names: list[str]) -> None:
    """All attach at once, and again if they must, until the process is ended."""
    with tempfile.TemporaryDirectory(prefix="idle-") as states:
        async with asyncio.TaskGroup() as tasks:
            for name in names:
                tasks.create_task(session(kit, address, name, Path(states)).run())


def main() -> None:
    """Attend with the sites that the arguments name."""
    kit, address, first, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    set_up_logging("human", "WARNING")
    asyncio.run(attend(kit, address, [f"site-{number}" for number in range(first, first + count)]))


if __name__ == "__main__":
    main()
