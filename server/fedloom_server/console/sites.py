"""``fedloom sites``: who takes part in the federation."""

import time
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedloom.v1.runs_pb2 import ListSitesRequest, Site
from fedloom.v1.session_pb2 import Device, Hello
from fedloom_server.console.connection import Operator, operator_command
from fedloom_server.console.formats import (
    FittingTable,
    as_data,
    bytes_text,
    console_for_output,
    json_text,
    plain,
    seconds_text,
)

app = typer.Typer(no_args_is_help=True, add_completion=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.callback()
def _sites() -> None:
    """Look at the sites of the federation."""


@operator_command(app, "list")
async def list_sites(operator: Operator, as_json: AsJson = False) -> None:
    """List the sites that the coordinator knows, with their devices and data sets."""
    async with operator.connect() as coordinator:
        answer = await coordinator.call(coordinator.runs.ListSites, ListSitesRequest())
    if as_json:
        typer.echo(json_text([as_data(site) for site in answer.sites]))
        return
    console_for_output().print(
        sites_table(answer.sites, time.time()) if answer.sites else "No site has attached yet."
    )


def sites_table(sites: Iterable[Site], now_s: float) -> Table:
    """One line a site: whether it is there, and what it said of itself."""
    table = FittingTable("site", "session", ">last heard", "devices", ">memory", "data sets", "software")
    for site in sites:
        session = Text("connected", style="green") if site.connected else Text("away", style="yellow")
        heard = (
            f"{seconds_text(max(0.0, now_s - site.last_heard_at_s))} ago" if site.last_heard_at_s else "never"
        )
        data = ", ".join(f"{item.name} ({bytes_text(item.size_bytes)})" for item in site.hello.data_sets)
        table.add_row(
            Text(plain(site.name)),
            session,
            heard,
            Text(plain(_devices(site.hello))),
            bytes_text(site.hello.memory_bytes) if site.hello.memory_bytes else "–",
            Text(plain(data) or "–"),
            Text(plain(site.hello.software) or "–"),
        )
    return table


def _devices(hello: Hello) -> str:
    counted: dict[str, int] = {}
    for device in hello.devices:
        name = _device_name(device)
        counted[name] = counted.get(name, 0) + 1
    return ", ".join(f"{count} × {name}" if count > 1 else name for name, count in counted.items()) or "–"


def _device_name(device: Device) -> str:
    memory = f" {bytes_text(device.memory_bytes)}" if device.memory_bytes else ""
    return f"{device.name or device.kind}{memory}"
