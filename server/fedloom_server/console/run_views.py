"""What the commands show of runs: from protobuf messages to rich renderables, and nothing else."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedloom.v1.runs_pb2 import Round, Run, RunFailure, RunState
from fedloom_server.console.formats import (
    FittingTable,
    bytes_text,
    duration_text,
    enum_word,
    first_line,
    metric_text,
    plain,
    time_text,
)
from fedloom_server.console.round_views import round_view, rounds_table, totals_table, troubles_table

RUN_STYLE = {
    RunState.RUN_STATE_QUEUED: "yellow",
    RunState.RUN_STATE_RUNNING: "bold cyan",
    RunState.RUN_STATE_FINISHED: "bold green",
    RunState.RUN_STATE_FAILED: "bold red",
    RunState.RUN_STATE_STOPPED: "bold yellow",
    RunState.RUN_STATE_WAITING: "bold yellow",
    RunState.RUN_STATE_PAUSED: "yellow",
}


def run_state(run: Run) -> Text:
    """The run's state as a coloured word."""
    return Text(enum_word(RunState.DESCRIPTOR, run.state), style=RUN_STYLE.get(run.state, ""))


def runs_table(runs: Iterable[Run], now_s: float) -> Table:
    """One line a run."""
    table = FittingTable(
        "run", "name", "state", ">prio", ">rounds", "submitted", ">time", "why",
        optional=["prio", "submitted"],
    )  # fmt: skip
    for run in runs:
        table.add_row(
            Text(plain(run.id), no_wrap=True),
            Text(plain(run.name)),
            run_state(run),
            str(run.priority),
            f"{run.rounds_done}/{run.rounds_total}",
            Text(time_text(run.submitted_at_s), no_wrap=True),
            duration_text(run.started_at_s, run.ended_at_s, now_s),
            Text(first_line(run.reason), style="dim"),
        )
    return table


def run_view(run: Run, rounds: Sequence[Round], chosen: Round | None, now_s: float) -> RenderableType:
    """All about one run: facts, rounds, what each site did in all, and every outcome that is not "done".

    With a ``chosen`` round, each site's work in that round instead of all rounds.
    """
    if chosen is not None:
        return Group(run_facts(run, now_s), Text(), round_view(chosen, now_s))
    parts: list[RenderableType] = [run_facts(run, now_s)]
    if rounds:
        parts += [Text(), rounds_table(rounds, now_s, run), Text(), totals_table(rounds)]
    if troubles := troubles_table(rounds):
        parts += [Text(), troubles]
    return Group(*parts)


def run_facts(run: Run, now_s: float) -> Table:
    """What is true of the run as a whole."""
    state = run_state(run)
    if run.reason:
        state.append(f"  {plain(run.reason)}", style="default not bold")
    model = (
        f"{run.model.digest[:19]}…  {bytes_text(run.model.size_bytes)}" if run.model.digest else "none yet"
    )
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column()
    facts.add_row("run", Text(plain(run.id), style="bold"))
    facts.add_row("name", Text(plain(run.name)))
    facts.add_row("state", state)
    facts.add_row("rounds", f"{run.rounds_done} of at most {run.rounds_total}")
    if aggregation := _aggregation(run.spec_json):
        facts.add_row("aggregation", Text(plain(aggregation)))
    if run.priority:
        facts.add_row("priority", str(run.priority))
    if run.cloned_from:
        model_of = f", from its model of round {run.cloned_round}" if run.HasField("cloned_round") else ""
        facts.add_row("clone of", Text(f"{plain(run.cloned_from)}{model_of}"))
    facts.add_row("submitted", time_text(run.submitted_at_s))
    facts.add_row("started", time_text(run.started_at_s))
    facts.add_row("ended", time_text(run.ended_at_s))
    facts.add_row("time", duration_text(run.started_at_s, run.ended_at_s, now_s))
    facts.add_row("model", Text(plain(model)))
    if config := next((file.digest for file in run.assets if file.name == "config.json"), ""):
        facts.add_row("config.json", Text(plain(config), overflow="fold"))
    if run.HasField("best_round"):
        value = f"{plain(run.best_metric)} {metric_text(run.best_value)}"
        facts.add_row("best", f"round {run.best_round}, {value}")
    if run.final_round != run.rounds_done:
        facts.add_row("final", f"the model of round {run.final_round}, which export gives")
    return facts


def failures_table(failures: Iterable[RunFailure]) -> Table:
    """One line a failure, first to last, without its log."""
    table = FittingTable("when", ">round", "site", "cause", "what")
    for failure in failures:
        table.add_row(
            Text(time_text(failure.at_s), no_wrap=True),
            _attempt(failure),
            Text(plain(failure.site) or "(coordinator)"),
            Text(plain(failure.cause), style="red"),
            Text(plain(failure.message)),
        )
    return table


def failures_view(failures: Iterable[RunFailure]) -> RenderableType:
    """Every failure with the last lines of its log."""
    parts: list[RenderableType] = []
    for failure in failures:
        parts.append(failures_table([failure]))
        if failure.log:
            parts.append(
                Text("\n".join(f"    {plain(line)}" for line in failure.log.splitlines()), style="dim")
            )
    return Group(*parts)


def _aggregation(spec_json: str) -> str:
    """The rule, the bound on updates and the server optimizer of a run, with what each was told."""
    told = json.loads(spec_json).get("aggregation", {}) if spec_json else {}
    parts = [_told(told[key]) for key in ("rule", "server_optimizer") if key in told]
    if told.get("clip"):
        parts.insert(1, _told({"name": "clip", **told["clip"]}))
    return ", ".join(parts)


def _told(part: Mapping[str, Any]) -> str:
    """A name with its parameters that are set, those of a schedule left out."""
    told = {key: value for key, value in part.items() if value is not None and not isinstance(value, dict)}
    name = told.pop("name", "")
    parameters = ", ".join(f"{key} {json.dumps(value)}" for key, value in told.items())
    return f"{name} ({parameters})" if parameters else str(name)


def _attempt(failure: RunFailure) -> str:
    return f"{failure.round}.{failure.attempt}" if failure.attempt else str(failure.round)
