"""`fedloom run export`: a run's model as a directory."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fedloom_common.errors import BadSpec
from fedloom_server.console.connection import Operator, operator_command
from fedloom_server.console.export import AsAdapter, Export
from fedloom_server.console.export import export as export_model
from fedloom_server.console.formats import bytes_text, console_for_output, plain
from fedloom_server.console.runapp import MOST_ROUNDS, RunId, app


@operator_command(app, "export")
async def export(
    operator: Operator,
    run: RunId,
    to: Annotated[
        Path, typer.Option(help="Directory for the model: new, empty, or an earlier export of this run.")
    ],
    round_number: Annotated[
        str,
        typer.Option(
            "--round",
            metavar="N|best",
            help="Take the model after this round; the run's final one if not given.",
        ),
    ] = "",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run with model.adapter: the adapter, as peft loads it.")
    ] = False,
    base: Annotated[
        str, typer.Option(help="With --adapter: directory or name under which peft is to find the base.")
    ] = "",
) -> None:
    """Fetch a run's model as a directory that transformers loads, with a model card.

    The final model is the latest, or, of a finished run with stop.patience.restore_best, the best.

    Adapters are merged into the frozen weights, unless --adapter asks for them alone.

    An export that broke off goes on where it was when called again.
    """
    number = _wanted_round(round_number)
    async with operator.connect() as coordinator:
        with _transfer_bar() as progress:
            bar = progress.add_task("exporting", total=None)
            done = await export_model(
                coordinator,
                run,
                to,
                round_number=number,
                adapter=AsAdapter(base_name=base) if adapter else None,
                on_bytes=lambda held, total: progress.update(bar, completed=held, total=total),
            )
    _tell(done, is_adapter=adapter)


def _tell(done: Export, *, is_adapter: bool) -> None:
    loader = "PeftModel.from_pretrained(base, "
    if not is_adapter:
        loader = f"{_class_of(done.directory)}.from_pretrained("
    console_for_output().print(
        f"Exported run {plain(done.run_id)} to {done.directory} ({bytes_text(done.size_bytes)}), "
        f"{_which_model(done)}.\n"
        f"Load it: {loader}{str(done.directory)!r})",
        soft_wrap=True,
    )


def _which_model(done: Export) -> str:
    if done.round:
        return f"the model of round {done.round}"
    return "the initial model" if done.rounds_done else "no round has finished: this is the initial model"


def _transfer_bar() -> Progress:
    """A bar of bytes on a terminal, which goes when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console_for_output(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _wanted_round(text: str) -> int | Literal["best"] | None:
    """The round that ``--round`` names; None for the final one.

    Raises:
        BadSpec: it is neither a number nor "best".
    """
    if text in ("", "best"):
        return "best" if text else None
    if not text.isdecimal() or int(text) > MOST_ROUNDS:
        raise BadSpec(f"--round {text}: wanted a round's number, or best")
    return int(text)


def _class_of(directory: Path) -> str:
    """The class of transformers that loads a model directory."""
    config = directory / "config.json"
    architectures = json.loads(config.read_text()).get("architectures") if config.is_file() else None
    return architectures[0] if architectures else "AutoModel"
