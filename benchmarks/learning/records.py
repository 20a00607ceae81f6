"""Records as the data of sites, and of a pool that holds out the very same ones."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom_client.config import DataSource
from fedloom_client.training.records import held_out_records
from learning.arms import POOL
from learning.corpora import data_sets

HELD_OUT = 0.2

Record = Mapping[str, Any]


def write_record_sites(
    records: Mapping[str, Sequence[Record]], into: Path
) -> dict[str, dict[str, DataSource]]:
    """Write each site's records; the data sets of every site, and of one that has all, and each for itself.

    A site holds out records by their place in its file. The pool's file has all sites' records in an order
    in which it holds out the same: pooled training must not see what it is measured on.
    """
    into.mkdir(parents=True)
    sources: dict[str, DataSource] = {}
    train: list[Record] = []
    held_out: list[Record] = []
    for site, own in records.items():
        sources[site] = _write(into / f"{site}.jsonl", own)
        for record, is_held in zip(own, held_out_records(HELD_OUT), strict=False):
            (held_out if is_held else train).append(record)
    pooled = _write(into / "pool.jsonl", arranged(train, held_out, HELD_OUT))
    return data_sets(sources, {POOL: pooled} | {alone_at(site): source for site, source in sources.items()})


def alone_at(site: str) -> str:
    """The data set of one machine that trains on a site's records alone."""
    return f"alone-{site}"


def arranged(train: Sequence[Record], held_out: Sequence[Record], share: float) -> list[Record]:
    """Records in an order in which exactly those of ``held_out`` are held out, but for the last few.

    What is left when one of both has run out, less than one record in ``1/share``, is dropped.
    """
    rows: list[Record] = []
    remaining = {False: iter(train), True: iter(held_out)}
    for is_held in held_out_records(share):
        record = next(remaining[is_held], None)
        if record is None:
            return rows
        rows.append(record)
    raise AssertionError("held_out_records never ends")


def _write(path: Path, records: Iterable[Record]) -> DataSource:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return DataSource(format="jsonl", files=(str(path),), held_out=HELD_OUT)
