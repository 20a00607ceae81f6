"""``fedloom run``: submit runs, look at them, stop them, take their model."""

import asyncio
import json
import sys
import time
from collections.abc import Collection, Sequence
from typing import Annotated

import typer
import yaml
from rich.console import Console

from fedloom.v1.runs_pb2 import ListFailuresRequest, Round, Run, RunFailure, SubmitRequest
from fedloom_common.errors import NotFound
from fedloom_common.runspec import parse_run_spec, run_spec_schema
from fedloom_server.console import runcontrol, runexport  # noqa: F401 (their commands join the group)
from fedloom_server.console.board import ENDED
from fedloom_server.console.connection import AsJson, Coordinator, Operator, operator_command
from fedloom_server.console.formats import as_data, console_for_output, json_text, plain
from fedloom_server.console.measured import require_measured, sites_data, sites_table
from fedloom_server.console.metrics import metrics
from fedloom_server.console.overrides import apply_overrides, read_spec_text
from fedloom_server.console.report import goal_of, report_data, report_view, site_reports
from fedloom_server.console.run_views import failures_table, run_view, runs_table
from fedloom_server.console.runapp import Overrides, Priority, Quiet, RunId, app
from fedloom_server.console.watch import EXIT_STATUS, HELD_UP
from fedloom_server.console.watch import watch as watch_run

GiveUp = Annotated[
    float,
    typer.Option("--give-up-s", min=0, help="Seconds to try for when the connection is lost while watching."),
]
GIVE_UP_S = 600.0
FAILURES_LOOKED_AT = 50


@operator_command(app, "submit")
async def submit(
    operator: Operator,
    spec: Annotated[
        str, typer.Argument(metavar="SPEC.yaml", help="File of the run spec, or - for standard input.")
    ],
    overrides: Overrides = None,
    priority: Priority = 0,
    follow: Annotated[
        bool, typer.Option("--watch", help="Stay and watch the run, as `fedloom run watch` does.")
    ] = False,
    quiet: Quiet = False,
    give_up_s: GiveUp = GIVE_UP_S,
) -> None:
    """Check a run spec and queue the run; prints the run's id.

    Where standard output is no terminal, the id is all that goes there: RUN=$(fedloom run submit spec.yaml).
    """
    text = apply_overrides(read_spec_text(spec), overrides or ())
    parse_run_spec(text)  # so that mistakes show without a network
    async with operator.connect() as coordinator:
        run = await coordinator.call_at_length(
            coordinator.runs.Submit, SubmitRequest(spec=text, priority=priority)
        )
        bare = quiet or not sys.stdout.isatty()
        if bare:
            typer.echo(plain(run.id))
        else:
            console_for_output().print(f"Submitted {plain(run.name)} as run {plain(run.id)}.", soft_wrap=True)
        if follow:
            await _watch_to_end(coordinator, run.id, console_for_output(stderr=bare), give_up_s)
        elif not bare:
            console_for_output().print(f"Watch it with: fedloom run watch {plain(run.id)}", soft_wrap=True)


@operator_command(app, "list")
async def list_runs(operator: Operator, as_json: AsJson = False) -> None:
    """List the runs, newest first, and what those that do not run wait for."""
    async with operator.connect() as coordinator:
        listed = await coordinator.all_runs()
    if as_json:
        typer.echo(json_text([as_data(run) for run in listed]))
    else:
        console_for_output().print(
            runs_table(listed, time.time())
            if listed
            else "No run yet; start one with `fedloom run submit SPEC.yaml`."
        )


@operator_command(app, "show")
async def show(
    operator: Operator,
    run: RunId,
    round_number: Annotated[
        int | None, typer.Option("--round", min=0, help="Show each site's work in this round.")
    ] = None,
    sites: Annotated[
        bool, typer.Option("--sites", help="Show what each site measured of each round's model.")
    ] = False,
    metric: Annotated[
        str, typer.Option(help="With --sites: this metric; that which the report judges by if not given.")
    ] = "",
    spec: Annotated[
        bool, typer.Option("--spec", help="Print the run's spec, with every default, as YAML.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show one run: its rounds, what each site did, and why anything was not done."""
    async with operator.connect() as coordinator:
        answer = await coordinator.run_with_rounds(run)
        failures: Sequence[RunFailure] = ()
        if not (spec or as_json or sites):
            request = ListFailuresRequest(run_id=answer.run.id, limit=FAILURES_LOOKED_AT)
            failures = (await coordinator.call(coordinator.runs.ListFailures, request)).failures
    if spec:
        typer.echo(yaml.safe_dump(json.loads(answer.run.spec_json), sort_keys=False), nl=False)
    elif as_json:
        typer.echo(json_text(sites_data(answer.rounds) if sites else as_data(answer)))
    elif sites:
        name = goal_of(answer.run, metric).metric
        require_measured(metric, answer.rounds)
        console_for_output().print(f"{plain(name)} on each site's held-out part", style="dim")
        console_for_output().print(sites_table(answer.rounds, name))
    else:
        chosen = None if round_number is None else _round(answer.run, answer.rounds, round_number)
        console_for_output().print(run_view(answer.run, answer.rounds, chosen, time.time()))
        if own := [failure for failure in failures if not failure.site]:  # the sites' stand with their rounds
            console_for_output().print(failures_table(own))
        if failures:
            hint = f"Last log lines: fedloom run failures {plain(answer.run.id)}"
            console_for_output().print(hint, soft_wrap=True)


@operator_command(app, "report")
async def report(
    operator: Operator,
    run: RunId,
    metric: Annotated[
        str,
        typer.Option(
            help="Judge by this metric (of a plug-in's own the lower is the better); by that of the run's "
            "best model if not given."
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show what the run was to each site: its data's share, and the metric of the initial model, of the one
    that it trained alone (evaluation.alone) and of the federated one. Was it worth joining?"""
    async with operator.connect() as coordinator:
        answer = await coordinator.run_with_rounds(run)
    require_measured(metric, answer.rounds)
    goal = goal_of(answer.run, metric)
    reports = site_reports(answer.run, answer.rounds, goal)
    if as_json:
        typer.echo(json_text(report_data(answer.run, reports, goal)))
    elif reports:
        console_for_output().print(report_view(answer.run, reports, goal))
    else:
        console_for_output().print("No site's update counts yet.")


@operator_command(app, "watch")
async def watch(
    operator: Operator,
    run: RunId,
    give_up_s: GiveUp = GIVE_UP_S,
    exit_when_waiting: Annotated[
        bool, typer.Option("--exit-when-waiting", help="End as soon as the run waits for sites or is paused.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a run until it ends: live on a terminal, else a line for each change.

    Exit status: 0 the run finished, 1 it failed, 3 it was stopped, 130 after Ctrl-C; with
    --exit-when-waiting also 4 it waits, 5 it is paused.

    Ctrl-C leaves the run going. A lost connection is opened again. With --json every event is a line of JSON.
    """
    until = (*ENDED, *HELD_UP) if exit_when_waiting else ENDED
    async with operator.connect() as coordinator:
        await _watch_to_end(coordinator, run, console_for_output(), give_up_s, as_json=as_json, until=until)


operator_command(app, "metrics")(metrics)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the run spec, for editors and other languages."""
    typer.echo(run_spec_schema())


async def _watch_to_end(
    coordinator: Coordinator,
    run_id: str,
    console: Console,
    give_up_s: float,
    *,
    as_json: bool = False,
    until: Collection[int] = ENDED,
) -> None:
    try:
        run = await watch_run(coordinator, run_id, console, give_up_s=give_up_s, as_json=as_json, until=until)
    except asyncio.CancelledError:  # Ctrl-C
        again = f"fedloom run watch {plain(run_id)}"
        console_for_output(stderr=True).print(f"The run goes on. See it again with: {again}", soft_wrap=True)
        raise
    raise typer.Exit(EXIT_STATUS[run.state])


def _round(run: Run, rounds: Sequence[Round], number: int) -> Round:
    found = {item.number: item for item in rounds}
    if number not in found:
        known = f"{min(found)} to {max(found)}" if found else "none yet"
        raise NotFound(f"run {plain(run.id)} has no round {number}; its rounds are {known}")
    return found[number]
