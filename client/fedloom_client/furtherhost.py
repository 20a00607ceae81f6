"""A further host of a site: its devices serve the worker group of the daemon on the first host."""

import asyncio
import logging
import socket

from fedloom_client.config import SiteConfig
from fedloom_client.launches import end_launcher, launch_of, start_launcher, trim_logs
from fedloom_common.signals import asked_to_end

REJOIN_S = 5.0  # between two tries to meet the group

logger = logging.getLogger(__name__)


async def join_group(config: SiteConfig) -> None:
    """Lend this host's devices to every group that the daemon starts, until SIGTERM or SIGINT."""
    logs = config.state_dir / "logs" / socket.gethostname()
    logs.mkdir(parents=True, exist_ok=True)
    with asked_to_end() as asked:
        stop = asyncio.create_task(asked.wait())
        while not stop.done():
            trim_logs(logs)
            launch = launch_of(config.workers, logs, socket=None, max_restarts=config.workers.max_restarts)
            launcher = await start_launcher(launch, config.state_dir)
            ended = asyncio.create_task(launcher.wait())
            await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                await end_launcher(launcher, ended)
                return
            status = ended.result()
            logger.info(
                "the worker group has ended; this host waits for the next one", extra={"status": status}
            )
            await asyncio.wait({stop}, timeout=REJOIN_S if status else 0)
