"""The coordinator as a process: signals, systemd, and an end that is bounded."""

import asyncio
import logging
import os
import signal
import threading

from fedloom_common.systemd import feed_watchdog, notify
from fedloom_server.app import coordinator
from fedloom_server.config import CoordinatorConfig

FOLD_S = 5.0  # beyond drain_s, for a thread that folds or hashes

logger = logging.getLogger(__name__)


async def serve_until_signalled(config: CoordinatorConfig) -> None:
    """Run the coordinator until SIGTERM or SIGINT, then drain: rounds go on after the next start.

    A second signal ends it at once, which costs nothing that is finished.

    Raises:
        BadSpec, WrongState: it cannot listen, or its state is in use by another coordinator.
    """
    signalled = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, signalled)
    async with coordinator(config):
        notify("READY=1")
        watchdog = asyncio.create_task(feed_watchdog(), name="watchdog")
        await signalled.wait()
        notify("STOPPING=1")
        watchdog.cancel()
        _end_after(config.drain_s + FOLD_S)
        logger.info("draining", extra={"grace_s": config.drain_s})
    logger.info("coordinator stopped")


def _on_signal(number: signal.Signals, signalled: asyncio.Event) -> None:
    if signalled.is_set():
        logger.warning("a second signal: ending at once", extra={"signal": number.name})
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    signalled.set()


def _end_after(seconds: float) -> None:
    """End the process then, whatever its threads do: a long fold is done again."""

    def end() -> None:
        logger.warning("work under way does not end; leaving it", extra={"waited_s": seconds})
        logging.shutdown()
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
