"""What the ``fedloom run`` commands share: the group that they join, and options that several have."""

from typing import Annotated

import typer

from fedloom.v1.runs_pb2 import Run
from fedloom_server.console.formats import console_for_output, plain
from fedloom_server.console.run_views import run_state

app = typer.Typer(
    help="Submit runs, look at them, hold, stop and clone them, take their model.",
    no_args_is_help=True,
    add_completion=False,
)

MOST_ROUNDS = (1 << 32) - 1  # what a message holds

RunId = Annotated[str, typer.Argument(metavar="RUN", help="Id of the run, or its beginning.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a value: --set local.steps=5. Repeat for more."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the run's id and nothing else.")]
Priority = Annotated[
    int,
    typer.Option(
        min=-(2**31), max=2**31 - 1, help="Of runs that wait for their turn higher ones begin first."
    ),
]


def say_state(run: Run) -> None:
    """Tell in a line what has become of a run."""
    reason = f": {plain(run.reason)}" if run.reason else ""
    console_for_output().print(f"Run {plain(run.id)} is {run_state(run)}{reason}", soft_wrap=True)
