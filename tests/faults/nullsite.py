"""The real daemon with a worker group whose update is the model with every value negated: no torch is needed.

Usage: nullsite.py SITE.yaml [--flags of `fedloom client`]
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

from fedloom_client.config import SiteConfig
from fedloom_client.daemon import Daemon
from fedloom_client.training.orders import Order, WorkerProgress, WorkerResult
from fedloom_common.logs import set_up_logging
from fedloom_common.settings import load_settings
from fedloom_common.tensors import Manifest

_SIGN = bytes(byte ^ 0x80 for byte in range(256))


class NegatingGroup:
    """Takes orders as the torchrun group does; the models have fp32 tensors only."""

    async def perform(self, order: Order, on_progress: Callable[[WorkerProgress], None]) -> WorkerResult:
        """Write the update: the sign bit of each value is flipped, so that the result is known to the bit."""
        on_progress(WorkerProgress(phase="train", total=1))
        await asyncio.to_thread(negate, Path(order.model_path), Path(order.update_path))
        return WorkerResult(examples=1, tokens=1, metrics={"loss": 0.0}, update_path=order.update_path)

    async def stop(self) -> None:
        """There are no processes to end."""


def negate(model: Path, update: Path) -> None:
    """Write a file of fp32 tensors again with every value negated."""
    content = bytearray(model.read_bytes())
    begin = min(info.start_bytes for info in Manifest.read(model).tensors)
    content[begin + 3 :: 4] = content[begin + 3 :: 4].translate(_SIGN)  # little-endian: the last byte of four
    update.write_bytes(content)


def main() -> None:
    """Run the daemon until it is told to end."""
    config, *flags = sys.argv[1:]
    settings = load_settings(SiteConfig, Path(config), env_prefix="FEDLOOM_CLIENT_", flags=flags)
    set_up_logging(settings.log_format, settings.log_level)
    asyncio.run(Daemon(settings, make_group=lambda data_set, folder: NegatingGroup()).run())


if __name__ == "__main__":
    main()
