import io
import json

from rich.console import Console

from fedloom_common.doctor.findings import Verdict, examine, ok, problem, warning
from fedloom_common.doctor.report import as_json, show


def breaks():
    yield ok("the first half")
    raise RuntimeError("a bug")


def checks():
    return {
        "disk": lambda: [ok("room enough"), warning("slow", "buy another")],
        "broken": breaks,
        "clock": lambda: [problem("an hour ahead", "set it")],
    }


def test_a_check_that_breaks_is_a_problem_and_the_others_are_made():
    found = [(finding.part, finding.verdict) for finding in examine(checks())]

    assert found == [
        ("disk", "ok"), ("disk", "warning"), ("broken", "ok"), ("broken", "problem"), ("clock", "problem"),
    ]  # fmt: skip


def test_the_report_shows_each_part_once_with_what_to_do_below_what_was_found():
    screen = io.StringIO()

    counted = show("a site", examine(checks()), Console(file=screen, width=60, color_system=None))

    lines = [line.strip() for line in screen.getvalue().splitlines()]
    assert lines[:6] == ["a site", "", "disk", "✓ room enough", "! slow", "→ buy another"]
    assert lines[-1] == "2 problems, 1 warning"
    assert counted[Verdict.PROBLEM] == 2


def test_what_a_peer_or_file_says_is_shown_as_it_is_and_steers_no_terminal():
    screen = io.StringIO()

    show("x", examine({"a": lambda: [problem("[bold]name\x1b[31m", "")]}), Console(file=screen, width=60))

    assert "[bold]name" in screen.getvalue()
    assert "\x1b[31mname" not in screen.getvalue()


def test_the_json_report_has_every_finding():
    text, counted = as_json(examine(checks()))

    assert json.loads(text)[1] == {
        "verdict": "warning", "told": "slow", "advice": "buy another", "part": "disk",
    }  # fmt: skip
    assert counted == {Verdict.OK: 2, Verdict.WARNING: 1, Verdict.PROBLEM: 2}
