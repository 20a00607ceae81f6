"""A pretrained BERT that tells the sentiment of sentences at four sites with other texts and other labels."""

import random
from pathlib import Path

from fedloom_client.config import DataSource
from learning.arms import POOL, Arm, Setting
from learning.downloads import vader
from learning.records import Record, alone_at, write_record_sites
from learning.trials import Experiment

SITES = ("amazon", "movies", "nyt", "tweets")
LABELS = ("negative", "neutral", "positive")
NEUTRAL = 0.5  # a mean rating nearer to 0 says neither
RATES = (5e-5, 1e-4, 2e-4)


def experiment(model: Path, steps: int, seeds: tuple[int, ...]) -> Experiment:
    """Pooled, federated, and each site alone."""
    alone = [
        Arm(
            name=f"alone-{site}",
            told=f"{site} alone",
            data=alone_at(site),
            has_all_tokens=False,
            rates_of="central",
        )
        for site in SITES
    ]
    arms = (
        Arm(name="central", told="all sentences on one machine", data=POOL, rates=RATES),
        Arm(name="fedavg-h10", told="FedAvg, H = 10", rates=RATES),
        Arm(name="fedprox-h10", told="FedProx, H = 10, μ = 0.01", rates_of="fedavg-h10",
            algorithm={"name": "fedprox", "mu": 0.01}),
        *alone,
    )  # fmt: skip
    return Experiment(
        name="sentiment",
        title="MiniLM on four sources of sentences",
        unit="sentence",
        setting=Setting(
            model={"path": str(model)},
            task={"kind": "classification", "labels": list(LABELS), "context_tokens": 64},
            sites=len(SITES),
            steps=steps,
            batch_examples=8,
            warmup_steps=max(1, steps // 10),
            evaluations=5,
            curve_examples=50,
            final_examples=400,
            metric="macro_f1",
            higher_is_better=True,
        ),
        arms=arms,
        seeds=seeds,
    )


def sites(downloads: Path, into: Path) -> dict[str, dict[str, DataSource]]:
    """Each source as a site; the order of its sentences is drawn once and for all."""
    return write_record_sites({site: _records(rated) for site, rated in vader(downloads).items()}, into)


def _records(rated: list[tuple[float, str]]) -> list[Record]:
    records = [{"text": text, "label": label_of(rating)} for rating, text in rated]
    random.Random(0).shuffle(records)
    return records


def label_of(rating: float) -> str:
    """The label of a mean rating."""
    if abs(rating) < NEUTRAL:
        return "neutral"
    return "positive" if rating > 0 else "negative"
