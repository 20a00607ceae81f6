"""How values read at the console: text that came over the network, numbers with units, messages as JSON."""

import json
import math
import sys
from datetime import datetime
from typing import Any

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from rich.console import Console, ConsoleOptions, RenderResult
from rich.filesize import decimal
from rich.table import Table

UNBOUNDED_COLUMNS = 10_000
PIPE_COLUMNS = 180  # where there is no terminal to fit: wide enough that no table drops text


def console_for_output(*, stderr: bool = False) -> Console:
    """A console that prints every string as it is: no markup, emoji codes or colour guesses."""
    file = sys.stderr if stderr else sys.stdout
    width = None if file.isatty() else PIPE_COLUMNS
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def plain(text: str) -> str:
    """Text from the network with nothing left in it that a terminal would obey."""
    return "".join(
        char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def first_line(text: str) -> str:
    """The first line that says something."""
    return next((line.strip() for line in plain(text).splitlines() if line.strip()), "")


def enum_word(enum: EnumDescriptor, number: int) -> str:
    """RUN_STATE_FINISHED as "finished"; a number that this version does not know as it is."""
    if number not in enum.values_by_number:
        return str(number)
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return enum.values_by_number[number].name.removeprefix(prefix).lower()


def bytes_text(size_bytes: float) -> str:
    """Bytes in decimal units."""
    return decimal(int(size_bytes))


def count_text(number: float) -> str:
    """A count with thousands set apart."""
    return f"{number:,.0f}"


def metric_text(value: float | None) -> str:
    """As many digits as tell two rounds apart; a dash for none."""
    if value is None:
        return "–"
    if abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.2f}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:.4g}"


def seconds_text(seconds: float) -> str:
    """A duration in the two largest units that it has."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}h"
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest_s:02}s"


def time_text(since_1970_s: float) -> str:
    """A moment in this machine's time zone; a dash for 0, which the contract sends for "not yet"."""
    if not since_1970_s:
        return "–"
    return datetime.fromtimestamp(since_1970_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration_text(started_at_s: float, ended_at_s: float, now_s: float) -> str:
    """From the start to the end, or to now; a dash before the start."""
    if not started_at_s:
        return "–"
    return seconds_text(max(0.0, (ended_at_s or now_s) - started_at_s))


class FittingTable(Table):
    """A table without lines that halves its gaps before it folds a cell."""

    def __init__(self, *columns: str) -> None:
        """Take the columns' names; ">" before a name sets the column to the right."""
        super().__init__(box=None, header_style="bold", pad_edge=False)
        for column in columns:
            name = column.removeprefix(">")
            self.add_column(name, justify="right" if name != column else "left", overflow="fold")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Choose the gaps for the width that there is."""
        self.padding = (0, 2, 0, 0)
        natural = self.__rich_measure__(console, options.update(width=UNBOUNDED_COLUMNS)).maximum
        if natural > options.max_width:
            self.padding = (0, 1, 0, 0)
        yield from super().__rich_console__(console, options)


def json_text(data: Any, *, indent: int | None = 2) -> str:
    """JSON without control characters, whatever the data."""
    return json.dumps(data, indent=indent, allow_nan=False)


def as_data(message: Message) -> dict[str, Any]:
    """A message for scripts: numbers as numbers, enums as words, embedded JSON as what it says.

    Unlike protobuf's own JSON, which makes strings of 64-bit integers. Fields that are absent stay so;
    NaN and infinities, which JSON has not, are "NaN", "Infinity" and "-Infinity".
    """
    data: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            kind = field.message_type.fields_by_name["value"]
            data[field.name] = {str(key): _field_value(kind, item) for key, item in value.items()}
        elif field.is_repeated:
            data[field.name] = [_field_value(field, item) for item in value]
        elif field.name.endswith("_json"):
            data[field.name.removesuffix("_json")] = json.loads(value or "null")
        else:
            data[field.name] = _field_value(field, value)
    return data


def _field_value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_data(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    return _json_value(value)


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
