"""A site whose training adds a constant: the real daemon, in a process of its own, with another worker group.

Usage: nullsite.py NAME GATE-SOCKET SITE.yaml [--flags of `fedloom client`]
"""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gate import HAS_MODEL, HAS_UPDATE, Visitor

from fedloom_client.config import SiteConfig
from fedloom_client.daemon import Daemon
from fedloom_client.training.orders import SPARE_UPDATE, Order, WorkerProgress, WorkerResult
from fedloom_common.files import atomic_file
from fedloom_common.logs import set_up_logging
from fedloom_common.settings import load_settings
from fedloom_common.tensors import Manifest, read_into

CONSTANT = np.float32(0.001)
PIECE_BYTES = 1 << 20


class NullGroup:
    """Takes orders as the torchrun group does."""

    def __init__(self, visitor: Visitor) -> None:
        self._visitor = visitor

    async def perform(self, order: Order, on_progress: Callable[[WorkerProgress], None]) -> WorkerResult:
        """Write the update: the model plus a constant."""
        on_progress(WorkerProgress(phase="train", total=1))
        model = Path(order.model_path)
        await self._visitor.arrive(order.round, HAS_MODEL, model=model)
        cpu_s = await asyncio.to_thread(add_constant, model, Path(order.update_path))
        await self._visitor.arrive(order.round, HAS_UPDATE, model=model, cpu_s=cpu_s)
        return WorkerResult(examples=1, tokens=1, metrics={"loss": 0.0}, update_path=order.update_path)

    async def stop(self) -> None:
        """There are no processes to end."""


def add_constant(model: Path, update: Path) -> float:
    """Write a model's file again with a constant added to every fp32 value; gives the CPU seconds it took.

    Memory: one piece.
    """
    began_s = time.thread_time()
    manifest = Manifest.read(model)
    buffer = np.empty(PIECE_BYTES, np.uint8)
    with (
        model.open("rb", buffering=0) as source,
        atomic_file(update, durable=False, over=update.with_name(SPARE_UPDATE)) as target,
    ):
        header = bytearray(manifest.size_bytes - sum(info.size_bytes for info in manifest.tensors))
        read_into(source.fileno(), memoryview(header), 0)
        target.write(header)
        for info in manifest.tensors:
            for offset in range(0, info.size_bytes, PIECE_BYTES):
                piece = buffer[: min(PIECE_BYTES, info.size_bytes - offset)]
                read_into(source.fileno(), piece.data, info.start_bytes + offset)
                if info.dtype == "F32":
                    values = piece.view("<f4")
                    np.add(values, CONSTANT, out=values)
                target.write(piece.data)
    return time.thread_time() - began_s


def main() -> None:
    """Run one site's daemon until it is told to end."""
    name, gate, config, *flags = sys.argv[1:]
    settings = load_settings(SiteConfig, Path(config), env_prefix="FEDLOOM_CLIENT_", flags=flags)
    set_up_logging(settings.log_format, settings.log_level)
    visitor = Visitor(Path(gate), name)
    asyncio.run(Daemon(settings, make_group=lambda data_set, folder: NullGroup(visitor)).run())


if __name__ == "__main__":
    main()
