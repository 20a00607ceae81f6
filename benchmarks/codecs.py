"""Codecs side by side: how small, how fast, how exact, on what a real training changed.

    python benchmarks/codecs.py
    python benchmarks/codecs.py --base before.safetensors --trained after.safetensors

Without files of your own it trains a small GPT on the demo's texts, some steps before the base and some
after. Speeds are bytes of the model over CPU seconds of one thread, so that other load on the machine hardly
matters; waiting for the disk is not counted. Files lie in memory (--scratch) and are warm.
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from machine import machine_facts
from measure import MB, Spread
from pydantic import TypeAdapter
from rich import box
from rich.console import Console
from rich.table import Table

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import Decoder
from fedloom_common.codecs.encoder import encode_model
from fedloom_common.codecs.feedback import Feedback
from fedloom_common.codecs.spec import Codecs
from fedloom_common.codecs.storage import Buffers
from fedloom_common.codecs.values import PIECE_VALUES, Values
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import ITEM_BYTES, Manifest, TensorInfo, write_tensors

CHAINS = (
    "fp32", "zstd", "bf16", "bf16,zstd", "fp16", "fp16,zstd", "int8", "int8,zstd", "int4", "int4,zstd",
    "topk", "topk,int8", "topk,int8,zstd",
)  # fmt: skip
TEXTS = Path(__file__).parents[1] / "examples/shakespeare/texts/comedies"
PACKAGES = ("fedloom", "numpy", "zstandard")
MEMORY = Path("/dev/shm")  # a file system in memory, not a name that others could take
SPEEDS = {
    "encode": "encode",
    "feedback": "encode with\nfeedback",
    "coding": "coding\nalone",
    "check": "check",
    "read": "decode",
    "read_change": "decode\nchange",
    "decoding": "decoding\nalone",
}
DIGEST = "blake3:" + "0" * 64

console = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one chain."""

    codec: str
    ratio: float
    """Bytes of the model over bytes of the encoded file."""
    rms_error: float
    """Over the root mean square of the change."""
    max_error: float
    """Over the largest change."""
    encode_peak_bytes: int
    """Memory that encoding took at most, beyond what the process had."""
    decode_peak_bytes: int
    speeds: dict[str, Spread | None]
    """GB/s of the model, for each of ``SPEEDS``; None where there is no such step."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One chain, two models and a folder."""

    codec: str
    base: Path
    trained: Path
    scratch: Path
    repeats: int


def measure(case: Case) -> Row:
    """Everything of one chain, in a process of its own."""
    stages = TypeAdapter(Codecs).validate_python(case.codec.split(","))
    chain, out = Chain(stages), case.scratch / "encoded.safetensors"
    with TensorFile(case.base) as base, TensorFile(case.trained) as trained:

        def encode(feedback: Feedback | None = None) -> None:
            encode_model(chain, trained=trained, base=base, base_digest=DIGEST, out=out, feedback=feedback)

        encode_peak = _peak_bytes(encode)
        with Decoder(out, chain, base=base, base_digest=DIGEST) as decoder:
            decode_peak = _peak_bytes(lambda: _read(decoder.read, base.manifest))
            size, has_change = base.manifest.size_bytes, decoder.has_change(_largest(base.manifest).name)
            steps: dict[str, Callable[[], object] | None] = {
                "encode": encode,
                "feedback": _fed_back(encode, case.scratch) if has_change else None,
                "check": decoder.check,
                "read": lambda: _read(decoder.read, base.manifest),
                "read_change": (lambda: _read(decoder.read_change, base.manifest, decoder))
                if has_change
                else None,
            }
            if has_change and not chain.is_sparse:
                alone = Alone(chain, trained, base)
                steps |= {"coding": alone.encode, "decoding": alone.decode}
            speeds = {
                name: None if (step := steps.get(name)) is None else _speed(step, size, case.repeats)
                for name in SPEEDS
            }
            rms, largest = _error(decoder, trained, base)
    return Row(
        codec=case.codec.replace(",", " + "),
        ratio=size / out.stat().st_size,
        rms_error=rms,
        max_error=largest,
        encode_peak_bytes=encode_peak,
        decode_peak_bytes=decode_peak,
        speeds=speeds,
    )


class Alone:
    """The coding of a dense chain without any file: the model's changes, piece by piece, in memory."""

    def __init__(self, chain: Chain, trained: TensorFile, base: TensorFile) -> None:
        self._chain = chain
        self._pieces: list[tuple[Values, Any]] = []
        for info in base.manifest.tensors:
            if chain.is_coded(info):
                change = _values(trained, info) - _values(base, info)
                layout = chain.layout(info)
                for start in range(0, len(change), PIECE_VALUES):
                    values = change[start : start + PIECE_VALUES]
                    self._pieces.append((values, Buffers(layout).of(len(values))))
        self._frames: list[list[list[memoryview]]] = []

    def encode(self) -> None:
        """Code every piece."""
        self._frames.clear()
        for values, raws in self._pieces:
            self._chain.values.encode(values, raws)
            if self._chain.frames is not None:
                parts = zip(self._chain.values.parts, raws, strict=True)
                frames = [self._chain.frames.compress(raw, part.planes) for part, raw in parts]
                self._frames.append([[memoryview(frame) for frame in some] for some in frames])

    def decode(self) -> None:
        """Decode every piece that :meth:`encode` made."""
        out = self._chain.scratch.values
        for place, (values, raws) in enumerate(self._pieces):
            if self._chain.frames is not None:
                for part, raw, frames in zip(
                    self._chain.values.parts, raws, self._frames[place], strict=True
                ):
                    self._chain.frames.decompress(frames, part.planes, raw)
            self._chain.values.decode(raws, out[: len(values)])


def _fed_back(encode: Callable[[Feedback], None], scratch: Path) -> Callable[[], None]:
    """Encoding with error feedback, from the second time on with something to add."""
    feedback = Feedback(scratch / "feedback", "benchmark")

    def step() -> None:
        encode(feedback)
        feedback.commit()

    step()
    return step


def _speed(step: Callable[[], object], size_bytes: int, repeats: int) -> Spread:
    step()
    speeds = []
    for _ in range(repeats):
        began_s = time.thread_time()
        step()
        speeds.append(size_bytes / (time.thread_time() - began_s) / 1e9)
    return Spread.of(speeds)


def _read(read: Callable[[str, int, Values], None], model: Manifest, only: Decoder | None = None) -> None:
    """Read all float tensors as an aggregator does; ``only`` those that a decoder has a change of."""
    values = np.empty(2 * PIECE_VALUES, np.float32)
    for info in model.tensors:
        if info.is_float and (only is None or only.has_change(info.name)):
            count = info.size_bytes // ITEM_BYTES[info.dtype]
            for start in range(0, count, len(values)):
                read(info.name, start, values[: count - start])


def _peak_bytes(step: Callable[[], object]) -> int:
    """Growth of resident memory while a step runs, by the kernel's high-water mark."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to what is resident now
    before = _status_bytes("VmHWM")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _error(decoder: Decoder, trained: TensorFile, base: TensorFile) -> tuple[float, float]:
    """Root mean square and largest error of a decoded model, over those of the change."""
    squares, changes, most, largest = 0.0, 0.0, 0.0, 0.0
    for info in base.manifest.tensors:
        if info.dtype == "F32":
            wanted = _values(trained, info).astype(np.float64)
            change, came = wanted - _values(base, info), np.empty(len(wanted))
            decoder.read(info.name, 0, came)
            squares, changes = squares + ((came - wanted) ** 2).sum(), changes + (change**2).sum()
            most = max(most, np.abs(came - wanted).max(initial=0))
            largest = max(largest, np.abs(change).max(initial=0))
    return float(np.sqrt(squares / changes)), float(most / largest)


def _values(source: TensorFile, info: TensorInfo) -> Values:
    values = np.empty(info.size_bytes // 4, np.float32)
    source.read(info.name, 0, values.view(np.uint8).data)
    return values


def _largest(model: Manifest) -> TensorInfo:
    return max(model.tensors, key=lambda info: info.size_bytes)


def train_models(folder: Path, steps: int) -> tuple[Path, Path]:
    """A small GPT after some steps of training, and after as many again."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=128, n_embd=384, n_layer=4, n_head=6, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).train()
    text = b"".join(path.read_bytes() for path in sorted(TEXTS.iterdir()))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    def batches() -> Iterator[torch.Tensor]:
        for _ in range(steps):
            starts = torch.randint(len(tokens) - 128, (8,))
            yield torch.stack([tokens[start : start + 128] for start in starts]).long()

    paths = folder / "base.safetensors", folder / "trained.safetensors"
    for path in paths:
        for batch in batches():
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        write_tensors(path, dict(model.named_parameters()))
    return paths


def table(rows: list[Row], facts: dict[str, Any]) -> Table:
    """All chains below each other."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    made = Table(
        title=f"{facts['model']}: GB/s of CPU time on one thread, counted at the model's size",
        caption=f"{facts['at']}: {facts['processor']}, {versions}; load {facts['load']:.1f}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    titles = (
        "codec",
        "ratio",
        *SPEEDS.values(),
        "rms error\nof change",
        "max error\nof change",
        "peak MB:\nen- / decode",
    )
    for number, title in enumerate(titles):
        made.add_column(title, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(
            row.codec,
            f"{row.ratio:.2f}",
            *(f"{speed.median:.2f}" if (speed := row.speeds[name]) else "" for name in SPEEDS),
            f"{row.rms_error:.1e}" if row.rms_error else "0",
            f"{row.max_error:.1e}" if row.max_error else "0",
            f"{row.encode_peak_bytes / MB:.0f} / {row.decode_peak_bytes / MB:.0f}",
        )
    return made


def main(
    base: Annotated[Path | None, typer.Option(help="A base model of yours, safetensors with fp32.")] = None,
    trained: Annotated[Path | None, typer.Option(help="What training made of it.")] = None,
    codecs: Annotated[str, typer.Option(help="Chains, as 'int8 topk,int8,zstd'.")] = " ".join(CHAINS),
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each speed; the median counts.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training, without --base.")] = 20,
    scratch: Annotated[Path, typer.Option(help="Folder for files.")] = MEMORY,
    output: Annotated[Path | None, typer.Option("--json", help="File for the figures as JSON.")] = None,
) -> None:
    """Measure codecs on what a training changed, and print one table."""
    if (base is None) != (trained is None):
        raise typer.BadParameter("give both --base and --trained, or neither")
    facts, rows = machine_facts(PACKAGES), []
    with tempfile.TemporaryDirectory(
        prefix="fedloom-codecs-", dir=scratch if scratch.is_dir() else None
    ) as name:
        folder = Path(name)
        if base is None or trained is None:
            console.log(f"training a small GPT, {2 * steps} steps")
            base, trained = train_models(folder, steps)
        facts["model"] = f"{base.stat().st_size / MB:.0f} MB, {len(Manifest.read(base).tensors)} tensors"
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as alone:
            for codec in codecs.split():
                console.log(codec)
                case = Case(codec=codec, base=base, trained=trained, scratch=folder, repeats=repeats)
                rows.append(alone.submit(measure, case).result())
    Console(width=170).print(table(rows, facts))
    if output is not None:
        output.write_text(
            json.dumps({"machine": facts, "codecs": [asdict(row) for row in rows]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
