"""``fedloom audit``: read the coordinator's audit log, take it away, check that nobody has changed it."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fedloom.v1.audit_pb2 import ListAuditRequest
from fedloom_common.errors import BadSpec
from fedloom_common.files import atomic_file, write_text
from fedloom_server.auditchain import Entry, Head, Verification
from fedloom_server.console.auditfiles import database_entries, file_entries, line_of, read_head
from fedloom_server.console.connection import AsJson, Coordinator, Operator, operator_command
from fedloom_server.console.formats import FittingTable, console_for_output, count_text, json_text, plain

PAGE_ENTRIES = 500

app = typer.Typer(
    help="Read the coordinator's audit log, take it away, and check it.",
    no_args_is_help=True,
    add_completion=False,
)


@operator_command(app, "list")
async def list_entries(
    operator: Operator,
    last: Annotated[int, typer.Option("--last", min=1, help="Entries to show, the newest.")] = 50,
    action: Annotated[
        str, typer.Option("--action", help='Of these, only actions that begin so: "run.", "call.refused".')
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show the newest entries, oldest of them first."""
    async with operator.connect() as coordinator:
        head = await _head(coordinator)
        entries = [entry async for entry in _entries(coordinator, after=max(0, head.seq - last))]
    entries = [entry for entry in entries if entry.action.startswith(action)]
    if as_json:
        typer.echo(json_text([vars(entry) | {"details": _details(entry)} for entry in entries]))
        return
    table = FittingTable(">entry", "at", "who", "action", "what", "details")
    for entry in entries:
        cells = (entry.at, entry.actor, entry.action, entry.subject, _facts_text(entry))
        table.add_row(str(entry.seq), *(Text(plain(cell)) for cell in cells))
    console_for_output().print(table if entries else "No such entry.")


@operator_command(app, "export")
async def export(
    operator: Operator,
    to: Annotated[
        Path | None, typer.Option("--to", help="File to write; standard output if not given.")
    ] = None,
) -> None:
    """Print every entry as a line of JSON, for another system to keep; `audit verify --file` checks it."""
    async with operator.connect() as coordinator:
        if to is None:
            async for entry in _entries(coordinator):
                typer.echo(line_of(entry))
            return
        with atomic_file(to) as file:
            async for entry in _entries(coordinator):
                file.write(f"{line_of(entry)}\n".encode())


@operator_command(app, "verify")
async def verify(
    operator: Operator,
    file: Annotated[Path | None, typer.Option("--file", help="Check an export instead, offline.")] = None,
    database: Annotated[
        str, typer.Option("--database", help="Check a database instead, offline: file coordinator.db or URL.")
    ] = "",
    head: Annotated[
        Path | None,
        typer.Option(
            "--head",
            help="File that keeps the head between checks, to tell when the newest entries were cut off.",
        ),
    ] = None,
) -> None:
    """Recompute the chain from its first entry; names the first that is wrong, and exits with 1."""
    if file is not None and database:
        raise BadSpec("--file and --database are both given; check one at a time")
    check = Verification(read_head(head) if head else None)
    if file is not None:
        check.follow(file_entries(file))
    elif database:
        check.follow(database_entries(database))
    else:
        async with operator.connect() as coordinator:
            async for entry in _entries(coordinator):
                check.follow([entry])
    check.end()
    _tell(check, head)


def _tell(check: Verification, head: Path | None) -> None:
    if check.fault:
        typer.secho(f"BROKEN: {check.fault}", fg=typer.colors.RED)
        typer.echo(f"{count_text(check.head.seq)} entries before it are as they were written.")
        raise typer.Exit(1)
    typer.echo(f"{count_text(check.head.seq)} entries, unbroken; head {check.head}")
    if head is not None:
        write_text(head, f"{check.head}\n")


async def _head(coordinator: Coordinator) -> Head:
    answer = await coordinator.call(coordinator.audit.List, ListAuditRequest())
    return Head(answer.head_seq, answer.head_hash)


async def _entries(coordinator: Coordinator, after: int = 0) -> AsyncIterator[Entry]:
    while True:
        request = ListAuditRequest(after=after, most=PAGE_ENTRIES)
        answer = await coordinator.call(coordinator.audit.List, request)
        for message in answer.entries:
            yield Entry(
                seq=message.seq, at=message.at, actor=message.actor, action=message.action,
                subject=message.subject, details=message.details, previous=message.previous,
                hash=message.hash,
            )  # fmt: skip
        if not answer.entries or answer.entries[-1].seq <= after:
            return
        after = answer.entries[-1].seq


def _details(entry: Entry) -> Any:
    try:
        return json.loads(entry.details)
    except ValueError:
        return entry.details  # somebody has changed it


def _facts_text(entry: Entry) -> str:
    details = _details(entry)
    if not isinstance(details, dict):
        return str(details)
    return ", ".join(f"{name} {value}" for name, value in details.items() if value not in ("", None))
