"""The coordinator as a process: what systemd hears of it, and an end that is bounded."""

import asyncio
import logging
import os
import threading

from fedloom_common.signals import asked_to_end
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
        StorageUnavailable: its database does not answer at the start.
    """
    with asked_to_end() as asked:
        async with coordinator(config) as running:
            notify("READY=1")
            watchdog = asyncio.create_task(feed_watchdog(), name="watchdog")
            ended = asyncio.create_task(asked.wait())
            await asyncio.wait([ended, running.owning], return_when=asyncio.FIRST_COMPLETED)
            notify("STOPPING=1")
            watchdog.cancel()
            _end_after(config.drain_s + FOLD_S)
            logger.info("draining", extra={"grace_s": config.drain_s})
            if running.owning.done():
                running.owning.result()  # the database is another's now
    logger.info("coordinator stopped")


def _end_after(seconds: float) -> None:
    """End the process then, whatever its threads do: a long fold is done again."""

    def end() -> None:
        logger.warning("work under way does not end; leaving it", extra={"waited_s": seconds})
        logging.shutdown()
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
