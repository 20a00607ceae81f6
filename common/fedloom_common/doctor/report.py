"""The report for people and for machines."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedloom_common.doctor.findings import Finding, Verdict

_MARKS = {Verdict.OK: "[green]✓[/]", Verdict.WARNING: "[yellow]![/]", Verdict.PROBLEM: "[bold red]✗[/]"}
_STYLES = {Verdict.OK: "", Verdict.WARNING: "yellow", Verdict.PROBLEM: "red"}


def show(title: str, findings: Iterable[Finding], console: Console) -> Counter[Verdict]:
    """Print each finding as it comes, and a line that counts them."""
    console.print(f"[bold]{escape(title)}[/]")
    part, counted = "", Counter[Verdict]()
    for finding in findings:
        if finding.part != part:
            part = finding.part
            console.print(f"\n[bold]{escape(part)}[/]")
        counted[finding.verdict] += 1
        _show(finding, console)
    console.print(f"\n{_summary(counted)}")
    return counted


def as_json(findings: Iterable[Finding]) -> tuple[str, Counter[Verdict]]:
    """The findings as a JSON list, and their count."""
    found = list(findings)
    text = json.dumps([asdict(finding) for finding in found], indent=2, ensure_ascii=False)
    return text, Counter(finding.verdict for finding in found)


def _show(finding: Finding, console: Console) -> None:
    lines = Table.grid(padding=(0, 1))
    lines.add_column(width=3, justify="right")
    lines.add_column(overflow="fold")
    lines.add_row(_MARKS[finding.verdict], Text(finding.told, style=_STYLES[finding.verdict]))
    if finding.advice:
        lines.add_row("[dim]→[/]", Text(finding.advice))
    console.print(lines)


def _summary(counted: Counter[Verdict]) -> str:
    if counted[Verdict.PROBLEM]:
        return f"[bold red]{_count(counted, Verdict.PROBLEM)}[/], {_count(counted, Verdict.WARNING)}"
    if counted[Verdict.WARNING]:
        return f"[yellow]{_count(counted, Verdict.WARNING)}[/], no problem"
    return "[bold green]all is well[/]"


def _count(counted: Counter[Verdict], verdict: Verdict) -> str:
    number = counted[verdict]
    return f"{number} {verdict}{'' if number == 1 else 's'}"
