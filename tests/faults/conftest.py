"""What was seen, told at the end: figures for docs/reliability.md."""

from collections.abc import Callable

import pytest

_SEEN: dict[str, list[str]] = {}


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Note a figure of this test's row."""
    return _SEEN.setdefault(request.node.originalname, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for test, figures in _SEEN.items():
        terminalreporter.write_line(f"seen in {test}: {'; '.join(figures)}")
