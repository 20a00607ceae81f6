"""The table of docs/reliability.md, made from the tests: each test with the marker ``faults`` is a row of it.

Usage: matrix.py    writes the table; what was seen stays as the document has it
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent.parent / "docs/reliability.md"
HEAD = "| What is injected | What must happen | What was seen | Test |\n|---|---|---|---|\n"
NOT_SEEN = "—"


@dataclass(frozen=True)
class Row:
    """What a test says of itself."""

    injected: str
    must: str
    test: str
    """File and function."""

    def line(self, seen: str) -> str:
        return f"| {self.injected} | {self.must} | {seen} | `{self.test}` |"


def rows() -> Iterator[Row]:
    """The tests' rows, by file and in their order there."""
    for path in sorted(HERE.glob("test_*.py")):
        module = importlib.import_module(f"faults.{path.stem}")
        for name, test in vars(module).items():
            for mark in getattr(test, "pytestmark", ()):
                if mark.name == "faults":
                    yield Row(**mark.kwargs, test=f"{path.name}::{name}")


def table_of(document: str) -> dict[str, tuple[str, str, str]]:
    """What the document's table says of each test: injected, must, seen."""
    cells = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in _lines_of(document))
    return {test.strip("`"): (injected, must, seen) for injected, must, seen, test in cells}


def with_table(document: str) -> str:
    """The document with the table as the tests have it."""
    before, _, after = document.partition(HEAD)
    known = table_of(document)
    for line in _lines_of(document):
        after = after.removeprefix(line + "\n")
    lines = [row.line(known[row.test][2] if row.test in known else NOT_SEEN) + "\n" for row in rows()]
    return before + HEAD + "".join(lines) + after


def _lines_of(document: str) -> list[str]:
    _, _, table = document.partition(HEAD)
    return list(takewhile(lambda line: line.startswith("|"), table.splitlines()))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
