"""Log lines for people or for machines, set up once by each process."""

import json
import logging
import os
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, TextIO

# Chatty at INFO about every file and connection they touch.
QUIET = (
    "alembic",
    "asyncio",
    "datasets",
    "filelock",
    "fsspec",
    "grpc",
    "httpx",
    "matplotlib",
    "urllib3",
    "uvicorn",
)

_OWN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_PACKAGES = ("fedloom_common.", "fedloom_server.", "fedloom_client.")
_COLOURS = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[1;31m"}
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

logger = logging.getLogger(__name__)


def set_up_logging(format: Literal["human", "json"], level: str, stream: TextIO | None = None) -> None:  # noqa: A002
    """Log to a stream, standard error by default, from here on; a second call replaces the first.

    Exceptions that nothing catches, in any thread, and Python's warnings become log lines too.
    """
    target = sys.stderr if stream is None else stream
    handler = _OurHandler(target)
    coloured = target.isatty() and not os.environ.get("NO_COLOR")
    handler.setFormatter(_JsonLines() if format == "json" else _HumanLines(coloured=coloured))
    root = logging.getLogger()
    root.handlers = [*(known for known in root.handlers if not isinstance(known, _OurHandler)), handler]
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


class _OurHandler(logging.StreamHandler[TextIO]):
    """Marks what ``set_up_logging`` installed, so that handlers of a test or an embedding program stay."""


class _HumanLines(logging.Formatter):
    def __init__(self, *, coloured: bool) -> None:
        super().__init__()
        self._coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        level = self._in(_COLOURS.get(record.levelname, ""), f"{record.levelname:<7}")
        facts = " ".join(f"{key}={_shown(value)}" for key, value in _fields(record).items())
        message = _printable(record.getMessage())
        line = f"{self._in(_DIM, time)} {level} {self._in(_DIM, _short(record.name))} {message}"
        return "\n".join(part for part in (f"{line}  {facts}".rstrip(), _traceback(record)) if part)

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._coloured and colour else text


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        # A field may not replace what every line has.
        line = {**line, **_fields(record), **line}
        if trace := _traceback(record):
            line["exception"] = trace
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _OWN_ATTRIBUTES}


def _short(name: str) -> str:
    for package in _PACKAGES:
        name = name.removeprefix(package)
    return name


def _printable(text: str) -> str:
    # What a peer sent may be in here: it must not forge a second line, nor steer a terminal.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = _printable(str(value))
    return text if text and not any(c in text for c in ' "=') else json.dumps(text, ensure_ascii=False)


def _traceback(record: logging.LogRecord) -> str:
    formatter = logging.Formatter()
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    parts += [formatter.formatStack(record.stack_info)] if record.stack_info else []
    return "\n".join(parts)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logger.critical("uncaught exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or args.exc_type is SystemExit:
        return
    trace = (args.exc_type, args.exc_value, args.exc_traceback)
    logger.critical(
        "uncaught exception", exc_info=trace, extra={"thread_name": args.thread and args.thread.name}
    )
