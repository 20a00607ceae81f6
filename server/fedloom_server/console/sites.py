"""``fedloom sites``: who takes part in the federation, and who may."""

import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from google.protobuf.message import Message

from fedloom.v1.runs_pb2 import Site
from fedloom.v1.sites_pb2 import (
    BlockSiteRequest,
    DrainSiteRequest,
    ForgetSiteRequest,
    GetSiteRequest,
    LabelSiteRequest,
    UnblockSiteRequest,
    UndrainSiteRequest,
)
from fedloom.v1.sites_pb2_grpc import SiteServiceStub
from fedloom_common.errors import BadSpec
from fedloom_server.console.connection import AsJson, Operator, Reason, operator_command
from fedloom_server.console.formats import as_data, console_for_output, json_text, plain
from fedloom_server.console.site_views import site_facts, sites_table, state_text

app = typer.Typer(no_args_is_help=True, add_completion=False)

Name = Annotated[str, typer.Argument(metavar="SITE", help="Name of the site.")]
Method = Callable[[SiteServiceStub], Any]


@app.callback()
def _sites() -> None:
    """Look at the sites of the federation, and decide who takes part."""


@operator_command(app, "list")
async def list_sites(operator: Operator, as_json: AsJson = False) -> None:
    """List the sites that the coordinator knows, with their devices and data sets."""
    async with operator.connect() as coordinator:
        listed = await coordinator.all_sites()
    if as_json:
        typer.echo(json_text([as_data(site) for site in listed]))
        return
    console_for_output().print(sites_table(listed, time.time()) if listed else "No site has attached yet.")


@operator_command(app, "show")
async def show(operator: Operator, site: Name, as_json: AsJson = False) -> None:
    """Show all that is known of a site."""
    async with operator.connect() as coordinator:
        answer = await coordinator.call(coordinator.sites.Get, GetSiteRequest(name=site))
    if as_json:
        typer.echo(json_text(as_data(answer)))
    else:
        console_for_output().print(site_facts(answer, time.time()))


@operator_command(app, "drain")
async def drain(operator: Operator, site: Name, reason: Reason = "", as_json: AsJson = False) -> None:
    """Give a site nothing new; it finishes what it has, and `sites list` says when that is done."""
    request = DrainSiteRequest(name=site, reason=reason)
    await _decide(operator, lambda sites: sites.Drain, request, as_json)


@operator_command(app, "undrain")
async def undrain(operator: Operator, site: Name, as_json: AsJson = False) -> None:
    """Give a drained site work again."""
    await _decide(operator, lambda sites: sites.Undrain, UndrainSiteRequest(name=site), as_json)


@operator_command(app, "block")
async def block(operator: Operator, site: Name, reason: Reason = "", as_json: AsJson = False) -> None:
    """End a site's session and its work at once, and refuse its calls until it is unblocked."""
    request = BlockSiteRequest(name=site, reason=reason)
    await _decide(operator, lambda sites: sites.Block, request, as_json)


@operator_command(app, "unblock")
async def unblock(operator: Operator, site: Name, as_json: AsJson = False) -> None:
    """Let a blocked site attach again."""
    await _decide(operator, lambda sites: sites.Unblock, UnblockSiteRequest(name=site), as_json)


@operator_command(app, "forget")
async def forget(operator: Operator, site: Name, as_json: AsJson = False) -> None:
    """Remove what is known of a site that has gone; what it did stays with its runs."""
    async with operator.connect() as coordinator:
        await coordinator.call(coordinator.sites.Forget, ForgetSiteRequest(name=site))
    typer.echo(json_text({"name": site, "forgotten": True}) if as_json else f"{plain(site)} is forgotten")


@operator_command(app, "label")
async def label(
    operator: Operator,
    site: Name,
    changes: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=VALUE...",
            help="ward=icu sets a label over the site's own, ward= takes the site's own away, ward- leaves "
            "the label to the site again.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Set labels of a site, by which runs choose it."""
    labels, dropped = _label_changes(changes)
    request = LabelSiteRequest(name=site, labels=labels, dropped=dropped)
    await _decide(operator, lambda sites: sites.Label, request, as_json)


async def _decide(operator: Operator, method: Method, request: Message, as_json: bool) -> None:
    """Have the coordinator change what holds for a site, and tell what holds then."""
    async with operator.connect() as coordinator:
        site: Site = await coordinator.call(method(coordinator.sites), request)
    if as_json:
        typer.echo(json_text(as_data(site)))
        return
    labels = ", ".join(f"{name}={value}" for name, value in sorted(site.labels.items()))
    typer.echo(plain(f"{site.name}: {state_text(site)}" + (f"; labels {labels}" if labels else "")))


def _label_changes(changes: list[str]) -> tuple[dict[str, str], list[str]]:
    labels, dropped = {}, []
    for change in changes:
        name, equals, value = change.partition("=")
        if equals and name:
            labels[name] = value
        elif change.endswith("-") and change != "-":
            dropped.append(change.removesuffix("-"))
        else:
            raise BadSpec(f"{change!r} is no change of a label; wanted NAME=VALUE, NAME= or NAME-")
    return labels, dropped
