"""``fedloom run metrics``: what was measured in a run, as a table or for other tools."""

import csv
import sys
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.text import Text

from fedloom.v1.metrics_pb2 import ListMetricsRequest, MetricPoint
from fedloom_server.console.connection import Coordinator, Operator
from fedloom_server.console.formats import FittingTable, as_data, console_for_output, json_text, plain

COLUMNS = ("round", "site", "name", "step", "value", "at_s")


async def metrics(
    operator: Operator,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of the run, or its beginning.")],
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print every point as CSV, samples of training under way too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every point as JSON, for scripts.")] = False,
) -> None:
    """Show the metrics of each round over all sites; with --csv or --json, every point of every site.

    CSV has a header line. An empty site stands for all sites; a step above 0 is a sample within a round.
    """
    async with operator.connect() as coordinator:
        points = await _points(coordinator, run)
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(point, name) for name in COLUMNS] for point in points)
    elif as_json:
        typer.echo(json_text([as_data(point) for point in points]))
    else:
        _show([point for point in points if not point.site])


async def _points(coordinator: Coordinator, run_id: str) -> list[MetricPoint]:
    with coordinator.errors():
        request = ListMetricsRequest(run_id=run_id)
        return [point async for page in coordinator.metrics.List(request) for point in page.points]


def _show(points: Iterable[MetricPoint]) -> None:
    """A line a round, a column a metric."""
    rounds: dict[int, dict[str, float]] = {}
    for point in points:
        rounds.setdefault(point.round, {})[point.name] = point.value
    if not rounds:
        console_for_output().print("No round has been measured yet.")
        return
    names = sorted({name for metrics in rounds.values() for name in metrics})
    table = FittingTable(">round", *(f">{plain(name)}" for name in names))
    for number, values in sorted(rounds.items()):
        cells = (f"{values[name]:.6g}" if name in values else "" for name in names)
        table.add_row(str(number), *(Text(cell) for cell in cells))
    console_for_output().print(table)
