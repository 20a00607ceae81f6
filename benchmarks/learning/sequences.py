"""A small encoder-decoder that gives plain words their capitals, stops and line breaks back."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedloom_client.config import DataSource
from fedloom_client.splitting.census import Coded
from fedloom_client.splitting.rules import grouped
from learning.arms import POOL, Arm, Setting
from learning.corpora import whole_files
from learning.language import DILOCO
from learning.records import Record, alone_at, write_record_sites
from learning.trials import Experiment

SITES = 4
CHARACTERS = (16, 56)
"""Of one target, at least and at most: a byte is a token here."""
RATES = (1e-3, 2e-3, 4e-3)


def experiment(steps: int, seeds: tuple[int, ...]) -> Experiment:
    """Pooled, one site alone, and federated."""
    arms = (
        Arm(name="central", told="all passages on one machine", data=POOL, rates=RATES),
        Arm(
            name="alone",
            told="one site alone",
            data=alone_at("site-1"),
            has_all_tokens=False,
            rates_of="central",
        ),
        Arm(name="fedavg-h10", told="FedAvg, H = 10", rates=RATES),
        Arm(name="diloco-h10", told="DiLoCo, H = 10", rates=RATES, server=DILOCO),
    )
    config = {"model_type": "t5", "d_model": 96, "d_kv": 24, "d_ff": 256, "num_layers": 2, "num_heads": 4,
              "dropout_rate": 0.0}  # fmt: skip
    return Experiment(
        name="sequences",
        title="A small T5 that restores capitals and stops, at four sites",
        setting=Setting(
            model={"config": config, "tokenizer": "bytes"},
            task={"kind": "seq2seq", "source_tokens": 64, "target_tokens": 64, "generate_examples": 0},
            sites=SITES,
            steps=steps,
            batch_examples=8,
            warmup_steps=max(1, steps // 20),
            evaluations=5,
            curve_examples=64,
            final_examples=256,
        ),
        arms=arms,
        seeds=seeds,
    )


def sites(corpus: Path, into: Path) -> dict[str, dict[str, DataSource]]:
    """Whole files joined to sites alike in size, cut into passages."""
    files = list(whole_files(corpus))
    codes = np.arange(len(files), dtype=np.int32)
    sizes = np.array([len(text) for _, text in files], np.uint32)
    split = grouped(Coded(codes=codes, values=tuple(name for name, _ in files)), sizes, SITES)
    records: dict[str, list[Record]] = {name: [] for name in split.names}
    for number, (_, text) in enumerate(files):
        records[split.names[split.sites[number]]] += passages(text)
    return write_record_sites(records, into)


def passages(text: str) -> Iterator[Record]:
    """Passages between empty lines that are short enough, each with its plain words as the source."""
    for block in re.split(r"\n\s*\n", text):
        target = " / ".join(line.strip() for line in block.strip().splitlines())
        if CHARACTERS[0] <= len(target.encode()) <= CHARACTERS[1]:
            yield {"source": plain(target), "target": target}


def plain(text: str) -> str:
    """Words in small letters, with nothing between them but one space."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower()))
