"""What the console shows of sites."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from fedloom.v1.runs_pb2 import SITE_STATE_ACTIVE, SITE_STATE_BLOCKED, SITE_STATE_DRAINING, Site
from fedloom.v1.session_pb2 import Device, Hello
from fedloom_server.console.formats import FittingTable, bytes_text, plain, seconds_text, time_text

DAY_S = 86_400
SOON_DAYS, URGENT_DAYS = 30, 7


def sites_table(sites: Iterable[Site], now_s: float) -> Table:
    """One line a site: whether it is there, what it may do, and what it said of itself."""
    columns = (
        "site",
        "session",
        ">last heard",
        "certificate",
        "labels",
        "devices",
        ">memory",
        "data sets",
        "software",
    )
    table = FittingTable(*columns)
    for site in sites:
        style = "green" if site.connected and site.state == SITE_STATE_ACTIVE else "yellow"
        table.add_row(
            Text(plain(site.name)),
            Text(_session(site), style="red" if site.state == SITE_STATE_BLOCKED else style),
            _heard(site, now_s),
            _certificate(site, now_s),
            Text(plain(_labels(site)) or "–"),
            Text(plain(_devices(site.hello))),
            bytes_text(site.hello.memory_bytes) if site.hello.memory_bytes else "–",
            Text(plain(_data(site.hello)) or "–"),
            Text(plain(site.hello.software) or "–"),
        )
    return table


def site_facts(site: Site, now_s: float) -> Table:
    """A site, a line for each fact."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    facts = {
        "site": site.name,
        "session": "connected" if site.connected else "away",
        "state": state_text(site),
        "open work": "\n".join(site.open_assignments) or "none",
        "first heard": time_text(site.first_heard_at_s),
        "last heard": _heard(site, now_s),
        "certificate": f"{_certificate(site, now_s)}",
        "labels": _labels(site) or "–",
        "by operators": ", ".join(_operator_label(*item) for item in sorted(site.operator_labels.items()))
        or "–",
        "devices": _devices(site.hello),
        "memory": bytes_text(site.hello.memory_bytes) if site.hello.memory_bytes else "–",
        "data sets": _data(site.hello) or "–",
        "software": site.hello.software or "–",
    }
    for name, value in facts.items():
        table.add_row(name, Text(plain(value)))
    return table


def state_text(site: Site) -> str:
    """What operators let a site do, how far that has come, and why."""
    count = len(site.open_assignments)
    text = {SITE_STATE_BLOCKED: "blocked", SITE_STATE_DRAINING: "draining" if count else "drained"}.get(
        site.state, "active"
    )
    if count and site.state == SITE_STATE_DRAINING:
        text += f", {count} open"
    return f"{text} ({site.reason})" if site.reason else text


def _session(site: Site) -> str:
    there = "connected" if site.connected else "away"
    if site.state == SITE_STATE_BLOCKED:
        return "blocked"
    if site.state == SITE_STATE_DRAINING:
        count = len(site.open_assignments)
        return f"{there}, draining ({count} open)" if count else f"{there}, drained"
    return there


def _heard(site: Site, now_s: float) -> str:
    if not site.last_heard_at_s:
        return "never"
    return f"{seconds_text(max(0.0, now_s - site.last_heard_at_s))} ago"


def _certificate(site: Site, now_s: float) -> Text:
    """How long the certificate still counts: in colour when it is to be renewed."""
    if not site.certificate_expires_at_s:
        return Text("–")
    days = (site.certificate_expires_at_s - now_s) / DAY_S
    if days <= 0:
        return Text("expired", style="red")
    style = "red" if days <= URGENT_DAYS else "yellow" if days <= SOON_DAYS else ""
    return Text(f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} h", style=style)


def _labels(site: Site) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(site.labels.items()))


def _operator_label(name: str, value: str) -> str:
    return f"{name}={value}" if value else f"{name} taken away"


def _data(hello: Hello) -> str:
    return ", ".join(f"{item.name} ({bytes_text(item.size_bytes)})" for item in hello.data_sets)


def _devices(hello: Hello) -> str:
    counted: dict[str, int] = {}
    for device in hello.devices:
        name = _device_name(device)
        counted[name] = counted.get(name, 0) + 1
    return ", ".join(f"{count} × {name}" if count > 1 else name for name, count in counted.items()) or "–"


def _device_name(device: Device) -> str:
    memory = f" {bytes_text(device.memory_bytes)}" if device.memory_bytes else ""
    return f"{device.name or device.kind}{memory}"
