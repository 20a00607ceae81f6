"""The ``fedloom`` command: a thin root that finds each side's commands by entry points.

It imports the chosen command's module and no other, so that help is quick and the operator's
commands work where the site's libraries are missing.
"""

import sys
import traceback
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from fedloom_common.errors import FederationError, NeverRetry

GROUP = "fedloom.commands"
FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""A command's context settings, where its further flags are settings of a config."""
# Help must not import the commands to describe them.
SUMMARIES = {
    "audit": "Read, export and check the audit log.",
    "client": "The daemon at a data-holding site.",
    "coordinator": "The service that runs the federation.",
    "data": "Split one data set into those of sites.",
    "doctor": "Find what a site or a coordinator lacks, and say what to do.",
    "provision": "Make the certificates and configs of a federation.",
    "run": "Submit, watch, stop and export runs.",
    "sites": "See which sites there are, and decide about them.",
}


def main() -> NoReturn:
    """Run the command that the arguments name, and exit with its status.

    A failure that fedloom names is one line on standard error: status 2 if the same command would
    fail again, 1 otherwise; so is a file or folder that the system refuses, with status 1. Ctrl-C is
    status 130.
    """
    arguments = sys.argv[1:]
    commands = {entry.name: entry for entry in entry_points(group=GROUP)}
    try:
        if arguments and arguments[0] in commands:
            command = typer.main.get_command(_load(commands[arguments[0]]))
            sys.exit(command(args=arguments[1:], prog_name=f"fedloom {arguments[0]}"))
        sys.exit(typer.main.get_command(_root(commands))(args=arguments, prog_name="fedloom"))
    except FederationError as error:
        typer.secho(f"fedloom: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2 if isinstance(error, NeverRetry) else 1)
    except OSError as error:
        if error.filename is None:
            raise
        typer.secho(f"fedloom: {error.filename}: {error.strerror}", fg=typer.colors.RED, err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


class StartByDefault(TyperGroup):
    """Makes ``fedloom client --config site.yaml`` mean ``fedloom client start --config site.yaml``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``start`` first unless another command or help is asked for."""
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["start", *args]
        return super().parse_args(ctx, args)


def _load(entry: EntryPoint) -> typer.Typer:
    try:
        app = entry.load()
    except Exception as error:  # a module of another distribution may fail in any way
        traceback.print_exc()
        raise FederationError(
            f"the command {entry.name!r} cannot be loaded from {entry.value}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(app, typer.Typer):
        raise FederationError(
            f"the command {entry.name!r} is {entry.value}, a {type(app).__name__}, not a typer app"
        )
    return app


def _root(commands: dict[str, EntryPoint]) -> typer.Typer:
    """The root for help, the version and mistakes; the commands in it are only their names."""
    root = typer.Typer(name="fedloom", no_args_is_help=True, add_completion=False)

    @root.callback()
    def fedloom(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        """Federated training of large language models for organisations that may not share their data."""

    for name, entry in sorted(commands.items()):
        root.command(name, help=SUMMARIES.get(name, f"From {entry.value}."))(lambda: None)
    return root


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedloom {version('fedloom')}")
        raise typer.Exit
