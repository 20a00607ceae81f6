"""``fedloom client``: the daemon at a site, its health check, and joining the group of another host."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedloom_client.config import SiteConfig
from fedloom_common.cli import FLAGS, StartByDefault
from fedloom_common.errors import WrongState
from fedloom_common.logs import set_up_logging
from fedloom_common.nativelines import route_native_lines
from fedloom_common.settings import load_settings, settings_help

ENV_PREFIX = "FEDLOOM_CLIENT_"

ConfigFile = Annotated[
    Path | None, typer.Option("--config", envvar=ENV_PREFIX + "CONFIG", help="The config file, site.yaml.")
]


app = typer.Typer(
    cls=StartByDefault,
    add_completion=False,
    help="The daemon at a data-holding site; without a command it starts.",
    epilog="\n\n\b\n" + settings_help(SiteConfig, env_prefix=ENV_PREFIX),
)


@app.command(context_settings=FLAGS)
def start(context: typer.Context, config: ConfigFile = None) -> None:
    """Attach to the coordinator, train for it, and stay until SIGTERM or Ctrl-C."""
    settings = _settings(config, context.args)
    route_native_lines()
    set_up_logging(settings.log_format, settings.log_level)
    from fedloom_client.daemon import Daemon  # here, so that the health check is quick

    asyncio.run(Daemon(settings).run())


@app.command(context_settings=FLAGS)
def health(context: typer.Context, config: ConfigFile = None) -> None:
    """Exit with 0 only if the daemon of this config lives and is attached."""
    from fedloom_client.statedir import StateDir
    from fedloom_client.status import ill_health

    reason = ill_health(StateDir(_settings(config, context.args).state_dir).status)
    typer.echo(reason or "attached", err=reason is not None)
    sys.exit(0 if reason is None else 1)


@app.command(context_settings=FLAGS)
def drain(context: typer.Context, config: ConfigFile = None) -> None:
    """Have the daemon of this config finish and deliver what it has, take on nothing new, and end."""
    from fedloom_client.statedir import LEAVE_SIGNAL, StateDir

    state = StateDir(_settings(config, context.args).state_dir)
    holder = state.holder()
    if holder is None:
        raise WrongState(f"no client daemon uses state_dir {state.root}")
    os.kill(holder, LEAVE_SIGNAL)
    typer.echo(f"the daemon (process {holder}) drains; SIGTERM ends it sooner")


@app.command(context_settings=FLAGS)
def policy(
    context: typer.Context,
    spec: Annotated[Path, typer.Option("--spec", help="File of a run spec.")],
    config: ConfigFile = None,
) -> None:
    """Tell whether this site would take part in a run now; if not, which rules refuse it, and exit with 1.

    It goes by the config file, which a daemon that runs has read when it started.
    """
    from fedloom_client.consent import foretell, judged_later, read_spec

    run = read_spec(spec)
    reasons = foretell(_settings(config, context.args), run)
    for reason in reasons:
        typer.echo(f"refused: {reason}")
    if not reasons:
        later = judged_later(run)
        typer.echo(f"permitted, as far as the run spec tells; the model's {later} are judged later")
    sys.exit(1 if reasons else 0)


@app.command(context_settings=FLAGS)
def node(context: typer.Context, config: ConfigFile = None) -> None:
    """Lend this further host's devices to the site's worker group (workers.nnodes)."""
    settings = _settings(config, context.args)
    set_up_logging(settings.log_format, settings.log_level)
    from fedloom_client.furtherhost import join_group

    asyncio.run(join_group(settings))


def _settings(config: Path | None, flags: list[str]) -> SiteConfig:
    return load_settings(SiteConfig, config, env_prefix=ENV_PREFIX, flags=flags)
