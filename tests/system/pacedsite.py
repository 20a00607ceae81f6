"""The real daemon with a worker group that takes its time and adds a constant: no torch is needed.

Usage: pacedsite.py STEP EXAMPLES SECONDS SITE.yaml [--flags of `fedloom client`]
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from fedloom_client.config import SiteConfig
from fedloom_client.daemon import Daemon
from fedloom_client.training.orders import Order, WorkerProgress, WorkerResult
from fedloom_common.logs import set_up_logging
from fedloom_common.settings import load_settings


class PacedGroup:
    """Takes orders as the torchrun group does; the models have fp32 tensors only."""

    def __init__(self, step: float, examples: int, seconds: float) -> None:
        self._step, self._examples, self._seconds = np.float32(step), examples, seconds

    async def perform(self, order: Order, on_progress: Callable[[WorkerProgress], None]) -> WorkerResult:
        on_progress(WorkerProgress(phase="train", total=1))
        await asyncio.sleep(self._seconds)
        trained = {name: tensor + self._step for name, tensor in load_file(order.model_path).items()}
        Path(order.update_path).write_bytes(save(trained, {"format": "pt"}))
        return WorkerResult(
            examples=self._examples,
            tokens=self._examples,
            metrics={"loss": 1.0},
            update_path=order.update_path,
        )

    async def stop(self) -> None:
        """There are no processes to end."""


def main() -> None:
    """Run the daemon until it is told to end."""
    step, examples, seconds, config, *flags = sys.argv[1:]
    settings = load_settings(SiteConfig, Path(config), env_prefix="FEDLOOM_CLIENT_", flags=flags)
    set_up_logging(settings.log_format, settings.log_level)
    group = PacedGroup(float(step), int(examples), float(seconds))
    asyncio.run(Daemon(settings, make_group=lambda data_set, folder: group).run())


if __name__ == "__main__":
    main()
