"""SIGTERM and SIGINT: the first asks a service to end in order, a second one ends it at once."""

import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger(__name__)


@contextmanager
def asked_to_end() -> Iterator[asyncio.Event]:
    """An event that is set by the first signal; what is durable outlasts the second."""
    asked, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in ENDING:
        loop.add_signal_handler(number, _note, number, asked)
    try:
        yield asked
    finally:
        for number in ENDING:
            loop.remove_signal_handler(number)


def _note(number: signal.Signals, asked: asyncio.Event) -> None:
    if asked.is_set():
        logger.warning("a second signal: ending at once", extra={"signal": number.name})
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    asked.set()
