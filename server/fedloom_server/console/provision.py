"""``fedloom provision``: certificates and configs for everybody in a federation."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape

from fedloom_common.authority import LEAF_DAYS
from fedloom_common.errors import BadSpec
from fedloom_common.identity import Role
from fedloom_common.strict import NAME, Name
from fedloom_server.console.kit import PORT, Kit, create_kit
from fedloom_server.console.kitledger import CRL, CRL_DAYS

app = typer.Typer(
    no_args_is_help=True,
    help="Make the certificates and configs of a federation: a kit with one folder to copy to each host.",
)

Directory = Annotated[Path, typer.Option("--dir", help="The kit's directory.")]
Days = Annotated[int, typer.Option("--days", help="Days until the certificate ends.")]
Who = Annotated[
    Literal["site", "operator", "viewer", "coordinator"], typer.Argument(help="Role of the holder.")
]
OwnName = Annotated[str, typer.Argument(help="Name of the holder; none for the coordinator.")]
WhoseName = Annotated[str, typer.Argument(help="Small letters, digits, dots, dashes and underscores.")]


@app.command()
def init(
    host: Annotated[
        list[str],
        typer.Option(
            "--host",
            help="Name or IP address at which others reach the coordinator; repeat for more, main one first.",
        ),
    ],
    directory: Directory = Path("kit"),
    federation: Annotated[str, typer.Option(help="Name of the federation, like a host's.")] = "fedloom",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The coordinator's port.")] = PORT,
    days: Days = LEAF_DAYS,
) -> None:
    """Make a new kit: the CA, and the coordinator's folder."""
    kit = create_kit(directory, federation=federation, hosts=host, port=port, days=days)
    _say(
        f"Kit of federation [bold]{kit.federation}[/], whose coordinator is at [bold]{kit.coordinator}[/]:",
        (directory / "ca", "keep offline: whoever has ca.key can admit anybody"),
        (
            directory / "coordinator",
            "copy to the coordinator's host; there: fedloom coordinator --config coordinator.yaml",
        ),
        (None, "next: fedloom provision site NAME, and fedloom provision operator NAME"),
    )


@app.command()
def coordinator(directory: Directory = Path("kit"), days: Days = LEAF_DAYS) -> None:
    """Make the coordinator's folder anew, for the same hosts, when the old one was moved away."""
    folder = Kit(directory).add_coordinator(days=days)
    _say(
        "New certificate of the coordinator:", (folder, "copy to the coordinator's host, and start it again")
    )


@app.command()
def site(
    name: WhoseName,
    data: Annotated[
        list[str],
        typer.Option(
            help="NAME=GLOB: a data set's files at the site; repeat for more; else texts=data/*.txt",
            show_default=False,
        ),
    ] = [],  # noqa: B006 - typer copies it
    directory: Directory = Path("kit"),
    days: Days = LEAF_DAYS,
) -> None:
    """Make the folder of a site: its certificate, and a site.yaml to complete."""
    folder = Kit(directory).add_site(name, data=_data_sets(data), days=days)
    _say(
        f"Site [bold]{name}[/]:",
        (folder, "copy to the site's host, see that data in site.yaml names its files;"),
        (None, "there: fedloom client --config site.yaml"),
    )


@app.command()
def operator(name: WhoseName, directory: Directory = Path("kit"), days: Days = LEAF_DAYS) -> None:
    """Make the folder of somebody who submits, stops and exports runs."""
    _say_operator("Operator", name, Kit(directory).add_operator(name, days=days))


@app.command()
def viewer(name: WhoseName, directory: Directory = Path("kit"), days: Days = LEAF_DAYS) -> None:
    """Make the folder of somebody who may see everything and change nothing."""
    _say_operator("Viewer", name, Kit(directory).add_operator(name, may_change=False, days=days))


@app.command()
def renew(who: Who, name: OwnName = "", directory: Directory = Path("kit"), days: Days = LEAF_DAYS) -> None:
    """Make a new certificate for somebody, with the same identity; the one before counts until it ends."""
    role = Role(who)
    folder = Kit(directory).renew(role, _name_of(role, name), days=days)
    _say(
        f"New certificate of {f'{role} [bold]{name}[/]' if name else f'the {role}'}:",
        (folder, f"copy {role}.crt and {role}.key to the host, over the old ones: they are used at once,"),
        (None, "without a restart; to end the old certificate now, revoke its serial"),
    )


@app.command()
def revoke(
    who: Annotated[str, typer.Argument(metavar="ROLE|serial", help="site, operator, viewer, or: serial")],
    name: Annotated[str, typer.Argument(help="Name of the holder, or the serial number.")],
    directory: Directory = Path("kit"),
) -> None:
    """Revoke all certificates of somebody, or one by its serial number as the audit log tells it."""
    kit = Kit(directory)
    if who == "serial":
        kit.revoke_serial(name)
        count = 1
    elif who in (Role.SITE, Role.OPERATOR, Role.VIEWER):
        count = kit.revoke(Role(who), name)
    else:
        raise BadSpec(f"{who!r} cannot be revoked; wanted is site, operator or viewer, or serial")
    _say_revocations(f"{count} certificate{'s'[: count > 1]} of {who} [bold]{name}[/] revoked:", directory)


@app.command()
def crl(
    directory: Directory = Path("kit"),
    days: Annotated[int, typer.Option("--days", help="Days until the list ends.")] = CRL_DAYS,
) -> None:
    """Sign the revocation list anew before it ends: the coordinator takes no list that has."""
    Kit(directory).sign_revocations(days=days)
    _say_revocations("New revocation list:", directory)


def _say_revocations(title: str, directory: Path) -> None:
    _say(
        title,
        (
            directory / "ca" / CRL,
            "copy to the coordinator's host, where tls.crl names it: it is read at once",
        ),
    )


def _name_of(role: Role, name: str) -> str:
    if role is Role.COORDINATOR:
        return "coordinator"
    if not name:
        raise BadSpec(f"which {role}? give its name")
    return name


def _say_operator(title: str, name: str, folder: Path) -> None:
    _say(
        f"{title} [bold]{name}[/]:",
        (folder, "copy to where the commands are typed; there: fedloom run list --config operator.yaml"),
    )


def _data_sets(given: list[str]) -> dict[str, list[str]] | None:
    sets: dict[str, list[str]] = {}
    for item in given:
        name, equals, files = item.partition("=")
        if not equals or not files:
            raise BadSpec(f"--data is NAME=GLOB, such as texts=/srv/texts/*.txt, not {item!r}")
        try:
            TypeAdapter(Name).validate_python(name)
        except ValidationError as error:
            raise BadSpec(f"--data: {name!r} cannot name a data set; wanted are {NAME}") from error
        sets.setdefault(name, []).append(files)
    return sets or None


def _say(title: str, *lines: tuple[Path | None, str]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(title)
    width = max(len(str(folder)) for folder, _ in lines if folder) + 3
    for folder, text in lines:
        place = f"{folder}{'' if folder.suffix else '/'}" if folder else ""
        console.print(f"  [cyan]{escape(place.ljust(width))}[/]{text}")
