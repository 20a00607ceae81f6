"""``fedloom doctor site`` and ``fedloom doctor coordinator``; each side's checks are an entry point."""

import logging
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedloom_common.cli import FLAGS
from fedloom_common.doctor.findings import Finding, Verdict
from fedloom_common.doctor.report import as_json, show
from fedloom_common.errors import FederationError

GROUP = "fedloom.doctors"

Examination = Callable[[Path | None, list[str]], Iterator[Finding]]
"""Makes the findings from a config file and the flags that change it."""

AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON list instead.")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Look at everything that a site or a coordinator needs, and say what to do. Status 1: a problem.",
)


@app.command(context_settings=FLAGS)
def site(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(envvar="FEDLOOM_CLIENT_CONFIG", help="The config file, site.yaml.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Examine this host as a site; the daemon may run meanwhile."""
    _report("site", config, context.args, json)


@app.command(context_settings=FLAGS)
def coordinator(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(envvar="FEDLOOM_COORDINATOR_CONFIG", help="The config file, coordinator.yaml."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Examine this host as the coordinator; the service may run meanwhile."""
    _report("coordinator", config, context.args, json)


def _report(name: str, config: Path | None, flags: list[str], json: bool) -> None:
    entries = entry_points(group=GROUP, name=name)
    if not entries:
        raise FederationError(f"fedloom's part for a {name} is not installed here; install fedloom again")
    examination: Examination = next(iter(entries)).load()
    logging.getLogger().addHandler(logging.NullHandler())  # what a check logs, it finds too
    findings = examination(config, flags)
    if json:
        text, counted = as_json(findings)
        typer.echo(text)
    else:
        place = f" with {config}" if config else ""
        counted = show(f"fedloom {name}{place}", findings, Console(highlight=False))
    raise typer.Exit(1 if counted[Verdict.PROBLEM] else 0)
