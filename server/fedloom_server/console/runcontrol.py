"""``fedloom run pause | resume | stop | clone | failures``: what an operator does to runs that are there."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fedloom.v1.runs_pb2 import (
    CloneRequest,
    GetRequest,
    ListFailuresRequest,
    PauseRequest,
    ResumeRequest,
    StopRequest,
)
from fedloom.v1.runs_pb2_grpc import RunServiceStub
from fedloom_common.errors import BadSpec
from fedloom_common.runspec import parse_run_spec
from fedloom_server.console.connection import AsJson, Operator, Reason, operator_command
from fedloom_server.console.formats import as_data, console_for_output, json_text, plain
from fedloom_server.console.overrides import apply_overrides
from fedloom_server.console.run_views import failures_view
from fedloom_server.console.runapp import MOST_ROUNDS, Overrides, Priority, Quiet, RunId, app, say_state


@operator_command(app, "pause")
async def pause(operator: Operator, run: RunId, reason: Reason = "") -> None:
    """Hold a run until it is resumed; its sites stop, and the updates that have come are kept."""
    await _hold(operator, lambda runs: runs.Pause, PauseRequest(run_id=run, reason=reason))


@operator_command(app, "stop")
async def stop(operator: Operator, run: RunId, reason: Reason = "") -> None:
    """Stop a run; its last model stays, and it can be resumed."""
    await _hold(operator, lambda runs: runs.Stop, StopRequest(run_id=run, reason=reason))


@operator_command(app, "resume")
async def resume(operator: Operator, run: RunId) -> None:
    """Queue a run again: in its round if it was paused or waits, else after its last finished one."""
    async with operator.connect() as coordinator:
        after = await coordinator.call(coordinator.runs.Resume, ResumeRequest(run_id=run))
    say_state(after)


@operator_command(app, "clone")
async def clone(
    operator: Operator,
    run: RunId,
    overrides: Overrides = None,
    from_round: Annotated[
        str,
        typer.Option(metavar="N|latest", help="Go on from the model after this round, not from a new one."),
    ] = "",
    priority: Priority = 0,
    quiet: Quiet = False,
) -> None:
    """Queue a new run with the spec of another one, changed by --set; prints the new run's id."""
    number = _round_number(from_round)
    async with operator.connect() as coordinator:
        origin = (await coordinator.call(coordinator.runs.Get, GetRequest(run_id=run))).run
        text = apply_overrides(origin.spec_json, overrides or ())
        parse_run_spec(text)
        request = CloneRequest(
            run_id=origin.id, spec=text, from_round=number, from_latest=from_round == "latest",
            priority=priority,
        )  # fmt: skip
        new = await coordinator.call_at_length(coordinator.runs.Clone, request)
    if quiet or not sys.stdout.isatty():
        typer.echo(plain(new.id))
    else:
        console_for_output().print(f"Cloned {plain(origin.id)} as run {plain(new.id)}.", soft_wrap=True)


@operator_command(app, "failures")
async def failures(
    operator: Operator,
    run: RunId,
    limit: Annotated[
        int, typer.Option(min=0, max=MOST_ROUNDS, help="Only the newest so many; 0 for all.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what went wrong in a run: site, round, cause, and what sites tell of their logs."""
    async with operator.connect() as coordinator:
        request = ListFailuresRequest(run_id=run, limit=limit)
        answer = await coordinator.call(coordinator.runs.ListFailures, request)
    if as_json:
        typer.echo(json_text([as_data(failure) for failure in answer.failures]))
    else:
        console_for_output().print(
            failures_view(answer.failures) if answer.failures else "Nothing went wrong."
        )


async def _hold(
    operator: Operator, method: Callable[[RunServiceStub], Any], request: PauseRequest | StopRequest
) -> None:
    """Take a run out of work, which may last as long as a step of it, and tell its state then."""
    async with operator.connect() as coordinator:
        after = await coordinator.call_at_length(method(coordinator.runs), request)
    say_state(after)


def _round_number(text: str) -> int | None:
    """The round that ``--from-round`` names; None for the latest, and for none.

    Raises:
        BadSpec: it is neither a number nor "latest".
    """
    if text in ("", "latest"):
        return None
    if not text.isdecimal() or int(text) > MOST_ROUNDS:
        raise BadSpec(f"--from-round {text}: wanted a round's number, or latest")
    return int(text)
