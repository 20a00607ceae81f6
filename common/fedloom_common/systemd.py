"""Tells systemd how a service of Type=notify is; without systemd nothing happens."""

import asyncio
import logging
import os
import socket

logger = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send a line such as READY=1, STOPPING=1 or WATCHDOG=1 to whoever started this process."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # a name of Linux' abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)  # one that reads nothing must not hold this process up
            sender.connect(address)
            sender.sendall(state.encode())
    except OSError as error:
        logger.warning("systemd cannot be told", extra={"state": state, "error": str(error)})


async def feed_watchdog() -> None:
    """Tell systemd that the event loop turns, until cancelled; returns at once if it does not ask."""
    every_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    if not every_s or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(every_s)
