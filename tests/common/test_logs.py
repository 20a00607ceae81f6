import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fedloom_common.logs import QUIET, set_up_logging

logger = logging.getLogger("fedloom_server.rpc.session")


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, hook = list(root.handlers), root.level, sys.excepthook
    yield
    root.handlers, sys.excepthook = handlers, hook
    root.setLevel(level)
    logging.captureWarnings(False)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.NOTSET)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_human_line_has_the_facts_as_fields() -> None:
    stream = io.StringIO()
    set_up_logging("human", "INFO", stream)
    logger.info(
        "update received", extra={"site": "ward-a", "loss": 1.23456789, "reason": 'full "disk"', "note": ""}
    )
    date, time, rest = stream.getvalue().split(" ", 2)
    assert (len(date), len(time)) == (10, 8)
    assert rest == (
        'INFO    rpc.session update received  site=ward-a loss=1.23457 reason="full \\"disk\\"" note=""\n'
    )


def test_a_json_line_is_one_object_with_the_facts_as_keys() -> None:
    stream = io.StringIO()
    set_up_logging("json", "INFO", stream)
    logger.warning("update %s", "rejected", extra={"site": "ward-a", "level": "spoofed", "size": {1}})
    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "WARNING",
        "logger": "fedloom_server.rpc.session",
        "message": "update rejected",
        "site": "ward-a",
        "size": "{1}",
    }


@pytest.mark.parametrize("style", ["human", "json"])
def test_what_a_peer_sent_cannot_forge_a_second_line(style: str) -> None:
    stream = io.StringIO()
    set_up_logging(style, "INFO", stream)
    logger.info("refused: %s", "no\nINFO all is well\x1b[2J", extra={"site": "a\u2028b\x1b[31m"})
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("style", ["human", "json"])
def test_an_exception_comes_with_its_traceback(style: str) -> None:
    stream = io.StringIO()
    set_up_logging(style, "INFO", stream)
    try:
        raise ValueError("wrong")
    except ValueError:
        logger.exception("round failed")
    assert "round failed" in stream.getvalue()
    assert "Traceback (most recent call last)" in stream.getvalue()
    assert "ValueError: wrong" in stream.getvalue()


def test_levels_below_the_chosen_one_and_chatty_libraries_are_silent() -> None:
    stream = io.StringIO()
    set_up_logging("human", "INFO", stream)
    logger.debug("hidden")
    logging.getLogger("httpx").info("hidden too")
    logging.getLogger("httpx").warning("shown")
    assert [line.split(" ", 2)[2] for line in stream.getvalue().splitlines()] == ["WARNING httpx shown"]


def test_a_second_set_up_replaces_the_first_and_keeps_other_handlers() -> None:
    first, second, other = io.StringIO(), io.StringIO(), logging.NullHandler()
    logging.getLogger().addHandler(other)
    set_up_logging("human", "INFO", first)
    set_up_logging("human", "INFO", second)
    logger.info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1
    assert other in logging.getLogger().handlers


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, pipe, plain = Terminal(), io.StringIO(), Terminal()
    for stream in (terminal, pipe):
        set_up_logging("human", "INFO", stream)
        logger.error("wrong")
    monkeypatch.setenv("NO_COLOR", "1")
    set_up_logging("human", "INFO", plain)
    logger.error("wrong")
    assert ["\x1b[31m" in stream.getvalue() for stream in (terminal, pipe, plain)] == [True, False, False]


def run(code: str) -> list[dict[str, str]]:
    code = "from fedloom_common.logs import set_up_logging; set_up_logging('json', 'INFO')\n" + code
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, timeout=60
    )
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_uncaught_exceptions_and_warnings_become_log_lines() -> None:
    lines = run(
        "import threading, warnings\n"
        "warnings.warn('old')\n"
        "thread = threading.Thread(target=lambda: 1 / 0, name='worker'); thread.start(); thread.join()\n"
        "raise KeyError('gone')\n"
    )
    assert [line["level"] for line in lines] == ["WARNING", "CRITICAL", "CRITICAL"]
    assert "UserWarning: old" in lines[0]["message"]
    assert "ZeroDivisionError" in lines[1]["exception"]
    assert lines[1]["thread_name"] == "worker"
    assert "KeyError: 'gone'" in lines[2]["exception"]
