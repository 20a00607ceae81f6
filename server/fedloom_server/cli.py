"""``fedloom coordinator``: start the service, or ask whether it is healthy."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from fedloom_common.channels import open_channel
from fedloom_common.cli import FLAGS, StartByDefault
from fedloom_common.errors import FederationError, NotFound
from fedloom_common.identity import Peer, Role
from fedloom_common.logs import set_up_logging
from fedloom_common.nativelines import route_native_lines
from fedloom_common.rpc import federation_errors
from fedloom_common.settings import load_settings, settings_help
from fedloom_server.config import OWN_NAME, CoordinatorConfig, own_address

ENV_PREFIX = "FEDLOOM_COORDINATOR_"
HEALTH_S = 10.0

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", envvar=ENV_PREFIX + "CONFIG", help="The config file, coordinator.yaml."),
]

app = typer.Typer(
    cls=StartByDefault,
    add_completion=False,
    help="The service that runs the federation; without a command it starts.",
    epilog="\n\n\b\n" + settings_help(CoordinatorConfig, env_prefix=ENV_PREFIX),
)


@app.command(context_settings=FLAGS)
def start(context: typer.Context, config: ConfigFile = None) -> None:
    """Run rounds until SIGTERM or Ctrl-C; the round under way is kept and goes on after the next start."""
    settings = load_settings(CoordinatorConfig, config, env_prefix=ENV_PREFIX, flags=context.args)
    route_native_lines()
    set_up_logging(settings.log_format, settings.log_level)
    from fedloom_server.process import serve_until_signalled  # here, so that help and health need no torch

    asyncio.run(serve_until_signalled(settings))


@app.command(context_settings=FLAGS)
def health(context: typer.Context, config: ConfigFile = None) -> None:
    """Exit with 0 only if the coordinator of this config serves."""
    settings = load_settings(CoordinatorConfig, config, env_prefix=ENV_PREFIX, flags=context.args)
    asyncio.run(_check_health(settings))


@app.command(context_settings=FLAGS)
def migrate(
    context: typer.Context,
    config: ConfigFile = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 0 only if nothing is to be done.")
    ] = False,
    from_sqlite: Annotated[
        bool,
        typer.Option("--from-sqlite", help="Copy all rows of state_dir's database into `database`."),
    ] = False,
) -> None:
    """Bring the database to this release's tables, which `start` does by itself; no coordinator may run."""
    settings = load_settings(CoordinatorConfig, config, env_prefix=ENV_PREFIX, flags=context.args)
    set_up_logging(settings.log_format, settings.log_level)
    from fedloom_server.database import SQLITE_FILE, open_database  # here, so that help needs no SQL
    from fedloom_server.moving import copy_from_sqlite
    from fedloom_server.ownership import owned_database, owned_folder
    from fedloom_server.schema import latest_revision, require_latest, upgrade

    if settings.database_url is None and not (there := settings.state_dir / SQLITE_FILE).is_file():
        raise NotFound(
            f"there is no {there.absolute()} to migrate: give the coordinator's own --config or --state-dir; "
            "a new database needs nothing, the coordinator makes it when it starts"
        )
    database = open_database(settings.database_url, settings.state_dir)
    if check:
        require_latest(database)
    else:
        with owned_folder(settings.state_dir), owned_database(database):
            if from_sqlite:
                rows = copy_from_sqlite(settings.state_dir, database)
                typer.echo(f"{rows} rows copied")
            upgrade(database)
    typer.echo(f"the database has this release's tables, revision {latest_revision()}")


async def _check_health(config: CoordinatorConfig) -> None:
    """Ask the standard health service at the coordinator's own address, with its own certificate."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    address = own_address(config.listen)
    insecure = Peer(Role.COORDINATOR, "health") if config.insecure else None
    async with open_channel(address, config.tls, insecure, called=OWN_NAME) as channel:
        with federation_errors(f"the coordinator at {address}"):
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_S)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise FederationError(f"the coordinator at {address} does not serve; it may be draining")
    typer.echo("serving")
