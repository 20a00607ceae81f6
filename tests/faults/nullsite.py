"""The real daemon with a worker group that trains in no time: what comes out of it is known to the bit.

Usage: nullsite.py TRAINING.json SITE.yaml [--flags of `fedloom client`]
"""

import asyncio
import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from fedloom_client.backoff import Backoff
from fedloom_client.config import SiteConfig
from fedloom_client.daemon import Daemon
from fedloom_client.training.orders import SPARE_UPDATE, Order, WorkerProgress, WorkerResult
from fedloom_common.files import atomic_file
from fedloom_common.logs import set_up_logging
from fedloom_common.settings import load_settings
from fedloom_common.tensors import Manifest

Tensors = dict[str, NDArray[np.float32]]

PAUSE_S = (0.1, 1.0)  # first and longest pause before a site attaches again, so that 30 kills take a minute
LOSS = 1.5
_SIGN = bytes(byte ^ 0x80 for byte in range(256))


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a site trains: by negating the model, or by a drift of its own."""

    site: str
    log: str
    """File with a line for each training that began or ended."""
    examples: int = 1
    """n_k."""
    seconds: float = 0.0
    """How long a training takes."""
    negates: bool = False
    """Negate every value; otherwise add the site's drift."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Training":
        return cls(**json.loads(path.read_text()))


class NullGroup:
    """Takes orders as the torchrun group does; the models have fp32 tensors only."""

    def __init__(self, training: Training) -> None:
        self._training = training

    async def perform(self, order: Order, on_progress: Callable[[WorkerProgress], None]) -> WorkerResult:
        if order.work == "evaluate":
            on_progress(WorkerProgress(phase="evaluate", total=1))
            return WorkerResult(examples=1, tokens=1, metrics={"loss": LOSS}, update_path="")
        self._note("began", order)
        on_progress(WorkerProgress(phase="train", total=1))
        model, update = Path(order.model_path), Path(order.update_path)
        if self._training.negates:
            await asyncio.to_thread(negate, model, update)
        else:
            await asyncio.to_thread(drift, model, update, self._training.site, order.round)
        await asyncio.sleep(self._training.seconds)
        self._note("ended", order)
        examples = self._training.examples
        return WorkerResult(
            examples=examples, tokens=examples, metrics={"loss": LOSS}, update_path=order.update_path
        )

    async def stop(self) -> None:
        """There are no processes to end."""

    def _note(self, what: str, order: Order) -> None:
        with Path(self._training.log).open("a") as log:
            log.write(json.dumps({"what": what, "site": self._training.site, "id": order.id}) + "\n")


def negate(model: Path, update: Path) -> None:
    """Write a file of fp32 tensors again with every value negated."""
    content = bytearray(model.read_bytes())
    begin = min(info.start_bytes for info in Manifest.read(model).tensors)
    content[begin + 3 :: 4] = content[begin + 3 :: 4].translate(_SIGN)  # little-endian: the last byte of four
    update.write_bytes(content)


def drift(model: Path, update: Path, site: str, round_number: int) -> None:
    """Write the model as this site leaves it after a round."""
    with atomic_file(update, durable=False, over=update.with_name(SPARE_UPDATE)) as file:
        file.write(save(drifted(load_file(model), site, round_number), {"format": "pt"}))


def drifted(model: Tensors, site: str, round_number: int) -> Tensors:
    """The model with small changes that depend on nothing but site, round and tensor."""
    return {
        name: tensor + np.float32(0.01) * _noise(f"{site}/{round_number}/{name}", tensor.shape)
        for name, tensor in model.items()
    }


def _noise(key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)


def main() -> None:
    """Run the daemon until it is told to end."""
    training, config, *flags = sys.argv[1:]
    settings = load_settings(SiteConfig, Path(config), env_prefix="FEDLOOM_CLIENT_", flags=flags)
    set_up_logging(settings.log_format, settings.log_level)
    Backoff.__init__.__defaults__ = PAUSE_S
    group = NullGroup(Training.load(Path(training)))
    asyncio.run(Daemon(settings, make_group=lambda data_set, folder: group).run())


if __name__ == "__main__":
    main()
