"""How values read at the console: text that came over the network, numbers with units, messages as JSON."""

import json
import math
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from datetime import datetime
from typing import Any

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from rich.console import Console, ConsoleOptions, RenderResult
from rich.filesize import decimal
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

UNBOUNDED_COLUMNS = 10_000
LEFT_OUT = "…"  # heads what stands for columns that a terminal has no room for
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
    """A table without lines: on a narrow terminal it halves its gaps, then folds text between words, then
    leaves columns out, for which "…" stands. A number is never cut."""

    def __init__(self, *columns: str, optional: Sequence[str] = ()) -> None:
        """Take the columns' names; ">" before a name sets the column to the right.

        ``optional`` are names of columns that may be left out, the first one first.
        """
        super().__init__(box=None, header_style="bold", pad_edge=False)
        self._optional = optional
        for column in columns:
            name = column.removeprefix(">")
            self.add_column(name, justify="right" if name != column else "left", overflow="fold")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Choose gaps, columns and their widths for the width that there is."""
        shown = copy(self)
        for gap in (2, 1):
            shown.padding = (0, gap, 0, 0)
            sizes, room = shown._sizes(console, options), options.max_width
            if sum(size.maximum for size in sizes) + gap * (len(sizes) - 1) <= room:
                yield from Table.__rich_console__(shown, console, options)
                return
        for name in self._optional:
            if sum(size.minimum + 1 for size in sizes) <= room:
                break
            shown.columns = _without(shown.columns, name)
            sizes = shown._sizes(console, options)
        if sum(size.minimum + 1 for size in sizes) <= room:
            widths = _widths(sizes, room - len(sizes))
            shown.columns = [
                replace(column, width=width) for column, width in zip(shown.columns, widths, strict=True)
            ]
        yield from Table.__rich_console__(shown, console, options)

    def _sizes(self, console: Console, options: ConsoleOptions) -> list[Measurement]:
        """How narrow each column can be, with no word or number broken, and how wide, without gaps."""
        unbounded = options.update(width=UNBOUNDED_COLUMNS)

        def size(column: Column) -> Measurement:
            found = [Measurement.get(console, unbounded, Text(str(column.header)))]
            for cell in column.cells:
                least, most = Measurement.get(console, unbounded, cell)
                is_one = column.justify == "right" or (isinstance(cell, Text) and cell.no_wrap)
                found.append(Measurement(most if is_one else least, most))
            return Measurement(max(least for least, _ in found), max(most for _, most in found))

        return [size(column) for column in self.columns]


def _without(columns: Sequence[Column], name: str) -> list[Column]:
    """Columns without one, in whose place "…" stands if it stands nowhere yet."""
    at = next(number for number, column in enumerate(columns) if column.header == name)
    is_marked = any(column.header == LEFT_OUT for column in columns)
    mark = [] if is_marked else [Column(header=LEFT_OUT, _cells=[""] * len(list(columns[at].cells)))]
    kept = [*columns[:at], *mark, *columns[at + 1 :]]
    return [replace(column, _index=number) for number, column in enumerate(kept)]


def _widths(sizes: Sequence[Measurement], room: int) -> list[int]:
    """Each column's width: its narrowest, and what is left to those that are narrow and want more."""
    widths = [size.minimum for size in sizes]
    for _ in range(room - sum(widths)):
        wanting = [number for number, size in enumerate(sizes) if widths[number] < size.maximum]
        if wanting:
            widths[min(wanting, key=widths.__getitem__)] += 1
    return widths


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
